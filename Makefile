# `make demo` and `make test` set up all they need in .venv, with any Python
# from 3.11 on: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
# Extras to install; torch adds the tests against PyTorch.
EXTRAS ?= experiments,dev

BIN := $(VENV)/bin
# pyenv's shims fail for versions that are installed but not made global: then
# the interpreter behind the shim is taken.
INTERPRETER := $(shell $(PYTHON) --version >/dev/null 2>&1 && echo $(PYTHON) \
  || ls $${PYENV_ROOT:-$$HOME/.pyenv}/versions/*/bin/$(PYTHON) 2>/dev/null \
  | sort -V | tail -n 1)
WANTED := $(shell $(INTERPRETER) --version 2>&1) with $(EXTRAS)

.PHONY: setup demo test test-all lint format clean FORCE

setup: $(VENV)/.installed

# Holds what the environment was made with, and is renewed when that changes.
$(VENV)/.wanted: FORCE
	@test -n "$(INTERPRETER)" || \
	  { echo "error: PYTHON must be an interpreter, got $(PYTHON)" >&2; exit 2; }
	@mkdir -p $(VENV)
	@echo "$(WANTED)" | cmp -s - $@ || echo "$(WANTED)" > $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.wanted
	@$(INTERPRETER) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: PYTHON must be 3.11 or newer, got $(PYTHON)" >&2; exit 2; }
	$(INTERPRETER) -m venv --clear $(VENV)
	@echo "$(WANTED)" > $(VENV)/.wanted
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

demo: setup
	$(BIN)/python -m experiments.demo --name demo --overwrite

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-all: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

FORCE:
