# Three commands a newcomer types: make demo, make test, make lab. Each makes .venv by itself and
# installs only what is not there yet; `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEPS   := pyproject.toml constraints.txt
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-long lab bench lint format clean

help:            ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo   ## dataset, training, enhanced wavs, report: results/demo/report.html
	$(BIN)/diffbuf demo

test: lint            ## every check: lint, types, unit tests, notebooks
	$(BIN)/pytest -n 2 -m "not slow"
	$(BIN)/pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 120 notebooks

test-long: $(VENV)/.test   ## the slow tests too
	$(BIN)/pytest -n 2

lab: $(VENV)/.lab     ## JupyterLab on the notebooks, on loopback, with a token
	PYTHONFAULTHANDLER=1 $(BIN)/jupyter lab --ip=127.0.0.1 $(LAB_OPTIONS) notebooks/00_start_here.ipynb

bench: $(VENV)/.test  ## speed and memory on this machine, as a table and JSON
	$(BIN)/python -m benchmarks

lint: $(VENV)/.test   ## what CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove what the other targets made, but not .venv
	rm -rf results data/DN-LM-demo .pytest_cache .mypy_cache .ruff_cache build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffbuf needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras; a change of the dependencies installs again.
$(VENV)/.demo: $(DEPS) | $(VENV)/bin/python
	@echo "Installing diffbuf and its dependencies into $(VENV) (torch is large: a few minutes) ..."
	$(PIP) -e '.[demo,metrics]'
	@touch $@

$(VENV)/.lab: $(DEPS) | $(VENV)/bin/python
	@echo "Installing diffbuf, JupyterLab and their dependencies into $(VENV) ..."
	$(PIP) -e '.[demo,metrics,notebooks]'
	@touch $@

$(VENV)/.test: $(DEPS) | $(VENV)/bin/python
	@echo "Installing diffbuf and everything its checks need into $(VENV) ..."
	$(PIP) -e '.[demo,metrics,baselines,pretraining,notebooks,dev]'
	@touch $@
