# `make demo` and `make test` need Python (3.10 or newer, with venv) and make; all else they fetch themselves
# into .venv. Settings: PYTHON, TORCH, PIP_ARGS, for example
#   make test PYTHON=python3.12
#   make demo PIP_ARGS="--index-url <an index with CPU wheels>"
# Where there is no NVIDIA GPU, a CPU build of torch is taken if pip's configured indexes offer one.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
DEMO_DIR ?= demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow trials lint format bench clean distclean

# Relative paths only: the project may lie in a directory with spaces in its name.
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## small data and models: precompute, verify, draw; then train live and from the cache
	$(BIN)/vggt-cache demo "$(DEMO_DIR)"
	$(BIN)/python -m qwen_vl.demo "$(DEMO_DIR)"

test: lint ## all checks: ruff, mypy, pytest
	$(BIN)/python -m pytest

test-slow: $(READY) ## the longer trials
	$(BIN)/python -m pytest -m slow

trials: $(READY) ## the long campaigns against the store, resumed where they ended
	$(BIN)/python tests/trials/run_trials.py --resume
	$(BIN)/python tests/trials/mutants.py
	$(BIN)/python tests/trials/table.py

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## run every benchmark; results are printed
	@set -e; for script in benchmarks/bench_*.py; do \
	  [ -e "$$script" ] || continue; echo "== $$script"; $(BIN)/python "$$script"; done

clean: ## remove the demo and all caches of tools
	rm -rf "$(DEMO_DIR)" build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove .venv as well
	rm -rf .venv

# Two stamps, so that a changed pyproject.toml installs again without fetching torch again.
.venv/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "[ERROR] '$(PYTHON)' is no Python of 3.10 or newer: install one, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "[ERROR] '$(PYTHON)' cannot make virtual environments, because ensurepip is missing:" \
	    "install it (on Debian and Ubuntu the package python3-venv), or name another Python with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@# Without a GPU the default build works too, but it is several GB larger.
	@if [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; then false; else \
	  case "$(TORCH)" in torch==*+*) false;; torch==*) \
	    echo "no NVIDIA GPU: looking for a CPU build of $(TORCH)"; \
	    $(PIP) install $(PIP_ARGS) "$(TORCH)+cpu" 2>/dev/null;; *) false;; esac; fi \
	  || $(PIP) install $(PIP_ARGS) "$(TORCH)"
	@touch $@

$(READY): pyproject.toml .venv/.torch
	$(PIP) install $(PIP_ARGS) "$(TORCH)" --editable ".[dev,train]"
	@touch $@
