# make demo   set up, train a small model on synthetic chest CTs, segment one, say where the pictures are
# make test   set up and run the tests
# make lint   style, types and JSON formatting
SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach v,3.12 3.11 3.13 3.10,$(shell command -v python$(v) 2>/dev/null)) python3)
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests

.PHONY: demo test lint clean

# One stamp per set of requirements; it is remade only when they change.
$(VENV)/.installed-test $(VENV)/.installed-dev: $(VENV)/.installed-%: setup.cfg constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: Python 3.10-3.13 is needed, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the $* requirements into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

demo: $(VENV)/.installed-test
	@$(BIN)/python scripts/demo.py

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -n auto --dist worksteal $(TESTS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python scripts/format_json.py --check $$(git ls-files '*.json')

clean:
	rm -rf $(VENV) demo
