.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=

help:  ## show this list
	@awk -F ':.*## |^##@ ' '/^##@ /{print "\n" $$2} /^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nTimes are about those of one core of a server. Overrides go in ARGS:\n'
	@echo '  make train ARGS="optimizer.lr=0.1 trainer.max_epochs=3"; make train ARGS=--help shows all'

# The stamp is touched last, so an install that was cut short is done again.
$(VENV)/.installed: pyproject.toml
	@if command -v uv >/dev/null; then \
	  test -x $(RUN) || uv venv $(VENV); uv pip install --python $(RUN) -e '.[dev]'; \
	else \
	  test -x $(RUN) || $(PYTHON) -m venv $(VENV); \
	  echo 'Installing into $(VENV); PyTorch is large, the first time takes some minutes.'; \
	  $(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'; \
	fi
	@touch $@

##@ Train

train: $(VENV)/.installed  ## the CNN: 2 minutes; 10 seconds on bundled digits where MNIST is out of reach
	$(RUN) -m src.train data=auto $(ARGS)

fast: $(VENV)/.installed  ## 99.5 % after one epoch: half a minute; needs MNIST, as record does
	$(RUN) -m src.train experiment=fast $(ARGS)

record: $(VENV)/.installed  ## the most that 15,544 parameters reach: half an hour the first time
	$(RUN) -m src.train experiment=record $(ARGS)

sweep: $(VENV)/.installed  ## learning rate × dropout, nine runs: 20 minutes
	$(RUN) -m src.train sweep=lr_dropout data=auto $(ARGS)

tune: $(VENV)/.installed  ## search both with Optuna, bad trials end early: half an hour
	$(RUN) -m src.tune data=auto $(ARGS)

##@ Learn

lesson:  ## backpropagation to touch, in the browser
	@$(PYTHON) -c "import pathlib, webbrowser as w; a = pathlib.Path('docs/lesson.html').resolve().as_uri(); print(a); w.open(a)"

backprop: $(VENV)/.installed  ## the 2-2-2 network at six learning rates: 20 seconds
	$(RUN) -m src.train experiment=backprop sweep=backprop_lr $(ARGS)

##@ Look, and use: the shipped network, or ARGS=outputs/mnist/FOLDER

dashboard: $(VENV)/.installed  ## TensorBoard on outputs/
	$(RUN) -m src.dashboard $(ARGS)

report: $(VENV)/.installed  ## compare runs: ARGS=outputs/mnist/…_multirun, all of outputs/ without
	$(RUN) -m src.report $(if $(ARGS),,outputs) $(ARGS)

evaluate: $(VENV)/.installed  ## score the test images, picture the mistakes
	$(RUN) -m src.evaluate $(ARGS)

predict: $(VENV)/.installed  ## read pictures: ARGS=FILES, those of tests/ without
	$(RUN) -m src.predict $(if $(ARGS),,tests/images) $(ARGS)

draw: $(VENV)/.installed  ## draw a digit in the browser and see it read
	$(RUN) -m src.draw $(ARGS)

export: $(VENV)/.installed  ## to ONNX and torch.export
	$(RUN) -m src.export $(ARGS)

##@ Work on it

test: $(VENV)/.installed  ## run the tests
	$(RUN) -m pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/.installed  ## check style, types, and that no import runs up the floors
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy && $(VENV)/bin/lint-imports --no-cache

format: $(VENV)/.installed  ## rewrite the code in the project's style
	$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .

clean:  ## remove caches (outputs/, data/ and .venv stay)
	rm -rf .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help train fast record sweep tune lesson backprop dashboard report evaluate predict draw export test lint format clean
