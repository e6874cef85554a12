# make demo   set up, train a small model on synthetic chest CTs, segment one, say where the pictures are
# make test   set up and run the tests
# make test-reliability   kill, starve and feed rubbish to every entry point, and say what was lost
# make test-deploy   set up and test against real servers: MONAI Label, Orthanc, OHIF in a browser, MONAI Deploy
# make lint   style, types and JSON formatting
SHELL := /bin/bash
# The first interpreter that runs and has a version we support.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests
DEPLOY_TESTS ?= tests/deploy

.PHONY: demo test test-reliability test-deploy lint clean

# One stamp per set of requirements; it is remade only when they change.
$(VENV)/.installed-test $(VENV)/.installed-dev: $(VENV)/.installed-%: setup.cfg constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10-3.13 found; set PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the $* requirements into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

$(VENV)/.installed-deploy: tests/deploy/requirements.txt $(VENV)/.installed-test
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $<
	@touch $@

demo: $(VENV)/.installed-test
	@$(BIN)/python scripts/demo.py

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -n auto --dist worksteal $(TESTS)

test-reliability: $(VENV)/.installed-test
	@$(BIN)/python tests/reliability/run.py

test-deploy: $(VENV)/.installed-deploy
	@[ "$(DEPLOY_TESTS)" != tests/deploy ] || bash tests/deploy/install_debian.sh
	@$(BIN)/python scripts/serve_label.py --prepare
	@TEST_DEPLOY=1 $(BIN)/python -m pytest -vv --durations=5 $(DEPLOY_TESTS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python scripts/format_json.py --check $$(git ls-files '*.json')

clean:
	rm -rf $(VENV) demo
