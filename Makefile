# Two commands do all the set-up:  make train  (the main job)  and  make test  (the tests).
# PYTHON=python3.12 chooses the interpreter, ARGS="key=value ..." goes to the training command.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: venv train test test-fast test-slow check format clean dashboards-demo

venv: $(VENV)/.train

train: $(VENV)/.train
	PATH="$(abspath $(BIN)):$$PATH" deepspeed elip_ds/train.py --deepspeed ds_configs/z2.json $(ARGS)

test: test-fast test-slow

test-fast: $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

# One at a time: most of them start two ranks of their own.
test-slow: $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" python -m pytest -m slow $(ARGS)

# A real Prometheus (apt-get install --no-install-recommends prometheus) watches the demo train.
dashboards-demo: $(VENV)/.train
	PATH="$(abspath $(BIN)):$$PATH" python tools/watch_runs.py -- \
	    deepspeed elip_ds/train.py --deepspeed ds_configs/z2.json metrics.every="256 samples" $(ARGS)

check: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs data build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras, so that `make train` installs no more than it needs.
$(VENV)/.train: $(BIN)/python setup.cfg pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@
