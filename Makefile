.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  Overrides go in ARGS: make train ARGS="optimizer.lr=0.1 trainer.max_epochs=3"'

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

train: $(VENV)/.installed  ## train the CNN (on the bundled digits where MNIST is out of reach)
	$(RUN) -m src.train data=auto $(ARGS)

sweep: $(VENV)/.installed  ## train over a grid of learning rates and dropouts
	$(RUN) -m src.train sweep=lr_dropout data=auto $(ARGS)

backprop: $(VENV)/.installed  ## train the 2-2-2 network at six learning rates and compare them
	$(RUN) -m src.train experiment=backprop sweep=backprop_lr $(ARGS)

lesson:  ## open docs/lesson.html: backpropagation to touch, in the browser
	@$(PYTHON) -c "import pathlib, webbrowser as w; a = pathlib.Path('docs/lesson.html').resolve().as_uri(); print(a); w.open(a)"

tune: $(VENV)/.installed  ## search the learning rate and the dropout with Optuna; bad trials stop early
	$(RUN) -m src.tune data=auto $(ARGS)

test: $(VENV)/.installed  ## run the tests
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(VENV)/.installed  ## check style, types, and that no import runs up the floors
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy && $(VENV)/bin/lint-imports --no-cache

format: $(VENV)/.installed  ## rewrite the code in the project's style
	$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .

dashboard: $(VENV)/.installed  ## open TensorBoard on outputs/
	$(VENV)/bin/tensorboard --logdir outputs $(ARGS)

draw: $(VENV)/.installed  ## draw a digit in the browser and see it read
	$(RUN) -m src.draw $(ARGS)

clean:  ## remove caches (outputs/, data/ and .venv stay)
	rm -rf .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help train sweep tune backprop lesson test lint format dashboard draw clean
