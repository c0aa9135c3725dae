# Two commands on a machine that has only Python (3.11 or newer) and make: `make demo` and `make test`. Both create .venv and install
# into it on first use; the stamp files in it say what is installed, so later calls start at once.

PYTHON ?= python3
VENV ?= .venv
# Test processes. Compilation takes most of the time and is single-threaded, so one per core.
WORKERS ?= logical
# Passed on to the command: make demo ARGS=…, make test ARGS="-k layout".
ARGS ?=

BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The pins were resolved on Python 3.11; other versions may need newer packages and take the bounds of pyproject.toml.
PINS = $$($(BIN)/python -c 'import sys; print("--constraint constraints.txt" if sys.version_info[:2] == (3, 11) else "")')
# tests/serve runs both majors of OpenAI's client. Two of one name do not fit into one environment, so this one gets a directory of its own;
# what it needs, the other one brings.
OPENAI_3 = openai==3.54.0

.PHONY: help demo test test-all lint format clean distclean
.DEFAULT_GOAL := help

help:
	@echo 'make demo       plan, partition and run a small trained model, and check its answers'
	@echo 'make test       lint, types and the tests'
	@echo 'make test-all   the same with the tests marked slow'
	@echo 'make lint       lint and types only'
	@echo 'make format     rewrite the sources as the linter wants them'
	@echo 'make clean      remove caches and build products (distclean: and the virtual environment)'

demo: $(RUNTIME)
	@$(BIN)/python -m partinf demo $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal -m 'not slow' $(ARGS)

test-all: lint
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo --cache-dir .cache/import-linter
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .cache build dist
	find partinf tests experiments tpu_scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'partinf needs Python 3.11 or newer: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing partinf into $(VENV) (once; a minute or two)'
	@$(INSTALL) $(PINS) --editable '.[run]'
	@touch $@

# The development install holds the runtime, so it sets both stamps.
$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing partinf and its development tools into $(VENV) (once; a minute or two)'
	@$(INSTALL) $(PINS) --editable '.[dev]'
	@$(INSTALL) --no-deps --upgrade --target $(VENV)/openai-3 '$(OPENAI_3)'
	@touch $(RUNTIME) $@
