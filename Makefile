.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=
SLOW := slow or browser or slurm

help:  ## show this list
	@awk -F ':.*## |^##@ ' '/^##@ /{print "\n" $$2} /^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nTimes are for one thread of a server (docs/results.md). Overrides go in ARGS:\n'
	@echo '  make train ARGS="optimizer.lr=0.1 trainer.max_epochs=3"; make train ARGS=--help shows all'

# The stamp is touched last, so that an interrupted install is repeated.
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

train: $(VENV)/.installed  ## train the CNN on MNIST: 73 s; on bundled digits if MNIST is not available: 10 s
	$(RUN) -m src.train data=auto $(ARGS)

fast: $(VENV)/.installed  ## 99.5% after one epoch: 17 s; needs MNIST, as record does
	$(RUN) -m src.train experiment=fast $(ARGS)

record: $(VENV)/.installed  ## best accuracy with 15,544 parameters: 233 s, the first time 8 min more
	$(RUN) -m src.train experiment=record $(ARGS)

sweep: $(VENV)/.installed  ## learning rate × dropout: nine runs of 73 s
	$(RUN) -m src.train sweep=lr_dropout hydra/launcher=joblib data=auto $(ARGS)

tune: $(VENV)/.installed  ## search both with Optuna: 20 trials of at most 73 s, bad ones are pruned
	$(RUN) -m src.tune data=auto $(ARGS)

##@ Learn

lesson:  ## interactive backpropagation lesson in the browser
	@$(PYTHON) -c "import pathlib, webbrowser as w; a = pathlib.Path('docs/lesson.html').resolve().as_uri(); print(a); w.open(a)"

backprop: $(VENV)/.installed  ## train the 2-2-2 network at six learning rates: 15 s
	$(RUN) -m src.train experiment=backprop sweep=backprop_lr $(ARGS)

##@ Inspect and use: the shipped network, or ARGS=outputs/mnist/FOLDER

dashboard: $(VENV)/.installed  ## TensorBoard on the newest sweep, or the runs beside the newest; ARGS=--logdir=outputs: all
	@events=$$(ls -t outputs/*/*/events.out.* outputs/*/*/*/events.out.* 2>/dev/null | head -n 1); \
	$(RUN) -m tensorboard.main --logdir "$$(dirname "$$(dirname "$${events:-outputs/none/none}")")" $(ARGS)

report: $(VENV)/.installed  ## compare runs: ARGS=outputs/mnist/…_multirun; all of outputs/ by default
	$(RUN) -m src.report --open $(if $(ARGS),,outputs) $(ARGS)

evaluate: $(VENV)/.installed  ## score the test images, plot the mistakes
	$(RUN) -m src.evaluate $(ARGS)

predict: $(VENV)/.installed  ## classify image files: ARGS=FILES; those of tests/ by default
	$(RUN) -m src.predict $(if $(ARGS),,tests/images) $(ARGS)

draw: $(VENV)/.installed  ## draw a digit in the browser and see the prediction
	$(RUN) -m src.draw $(ARGS)

export: $(VENV)/.installed  ## export to ONNX and torch.export
	$(RUN) -m src.export $(ARGS)

##@ Develop

test: $(VENV)/.installed  ## run the tests: three minutes on two cores
	$(RUN) -m pytest -n auto --dist worksteal -m "not ($(SLOW))" $(ARGS)

test-slow: $(VENV)/.installed  ## run the slow tests: whole programs, browser, Slurm, databases
	$(RUN) -m pytest -n auto --dist worksteal -m "$(SLOW)" $(ARGS)

lint: $(VENV)/.installed  ## check style, docstrings, types and the layers of imports
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy && $(VENV)/bin/lint-imports --no-cache

format: $(VENV)/.installed  ## rewrite the code in the project's style
	$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .

clean:  ## remove caches (outputs/, data/ and .venv stay)
	rm -rf .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help train fast record sweep tune lesson backprop dashboard report evaluate predict draw export test test-slow lint format clean
