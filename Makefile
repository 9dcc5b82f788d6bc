# `make demo` and `make test` set up all they need in .venv, with the newest
# Python that constraints.txt has wheels for, or another from 3.11 on:
# make test PYTHON=python3.12
VENV ?= .venv
# Extras to install; torch adds the tests against PyTorch.
EXTRAS ?= experiments,dev

BIN := $(VENV)/bin
# Newest first. PyTorch's wheel for the CPU is there for 3.11 alone; others take
# one of several GB for CUDA.
VERSIONS := $(if $(findstring torch,$(EXTRAS)),3.11) 3.14 3.13 3.12 3.11
ifndef PYTHON
PYTHON := $(VERSIONS:%=python%) python3
# What is chosen here must be able to make an environment.
PROBE := -c "import ensurepip, venv"
endif
PROBE ?= --version
# The first that runs. pyenv's shims fail for versions that are installed but
# not made global: then the interpreter behind the shim is taken.
INTERPRETER := $(shell for name in $(PYTHON); do for python in $$name $$(ls \
  $${PYENV_ROOT:-$$HOME/.pyenv}/versions/*/bin/$$name 2>/dev/null | sort -rV); \
  do $$python $(PROBE) >/dev/null 2>&1 && echo $$python && exit; done; done)
WANTED := $(if $(INTERPRETER),$(shell $(INTERPRETER) --version 2>&1) with $(EXTRAS))

.PHONY: setup demo test test-all wheel-test lint docs format clean FORCE

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

# The wheel in empty environments with the newest dependencies; minutes each.
wheel-test:
	.ci/wheel

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In this environment where it has the extra docs, else in one of its own: neither
# is made anew for the other.
ifneq (,$(findstring docs,$(EXTRAS)))
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
else
docs:
	@$(MAKE) --no-print-directory docs VENV=$(VENV)-docs EXTRAS=docs
endif

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-docs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

FORCE:
