# `make demo` and `make test` need Python (3.10 or newer, with venv) and make; all else they fetch themselves
# into .venv. Settings: PYTHON, TORCH, PIP_ARGS, TEST_PROCESSES, for example
#   make test PYTHON=python3.12
#   make demo PIP_ARGS="--index-url <an index with CPU wheels>"
# `make bench-peers` has an environment of its own, .venv-peers, so that no other package gets into .venv; PEERS_ARGS
# are passed on to its script, such as PEERS_ARGS=--small. `make gpu` installs nothing: it runs with PYTHON as it is, whose
# torch finds the GPU; GPU_ARGS are passed on, such as GPU_ARGS="--only frame".
# Where there is no NVIDIA GPU, a CPU build of torch is taken if pip's configured indexes offer one.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
PEERS_ARGS ?=
GPU_ARGS ?=
TEST_PROCESSES ?= 2
DEMO_DIR ?= demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-lowest trials trials-stop lint format bench bench-peers gpu clean distclean

# Relative paths only: the project may lie in a directory with spaces in its name.
BIN := .venv/bin
READY := .venv/.ready
PEERS_READY := .venv-peers/.ready
# Of the environment that is being made: the stamp's folder.
PIP = $(@D)/bin/python -m pip --disable-pip-version-check --quiet
# Peers are compared in their own environment.
BENCHES = $(filter-out benchmarks/bench_peers.py,$(wildcard benchmarks/bench_*.py))

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## small data and models: precompute, verify, draw; then train live and from the cache
	$(BIN)/vggt-cache demo "$(DEMO_DIR)"
	$(BIN)/python -m janusvln.demo "$(DEMO_DIR)"

test: lint ## all checks: ruff, mypy, pytest
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## the longer trials
	$(BIN)/python -m pytest -m slow

test-lowest: $(READY) ## import everything and train with the lowest declared versions (installs 6 GB)
	$(BIN)/python -m pytest -m slow tests/test_lowest_versions.py

trials: $(READY) ## the long campaigns against the store, resumed where they ended
	$(BIN)/python tests/trials/run_trials.py --resume --jobs $(TEST_PROCESSES)
	$(BIN)/python tests/trials/mutants.py
	$(BIN)/python tests/trials/table.py

trials-stop: $(READY) ## training runs stopped and killed at random moments, beside ones that were not
	$(BIN)/python tests/trials/stopped_training.py

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## run every benchmark; results are printed
	@set -e; for script in $(BENCHES); do \
	  echo "== $$script"; $(BIN)/python "$$script"; done

bench-peers: $(PEERS_READY) ## the store beside other ways of keeping features
	.venv-peers/bin/python benchmarks/bench_peers.py $(PEERS_ARGS)

gpu: ## check and measure all that only a GPU can tell, in 500 s, with $(PYTHON) and its torch
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

clean: ## remove the demo and all caches of tools
	rm -rf "$(DEMO_DIR)" build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove .venv and .venv-peers as well
	rm -rf .venv .venv-peers

# Two stamps, so that a changed pyproject.toml installs again without fetching torch again.
.venv/.torch .venv-peers/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "[ERROR] '$(PYTHON)' is no Python of 3.10 or newer: install one, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "[ERROR] '$(PYTHON)' cannot make virtual environments, because ensurepip is missing:" \
	    "install it (on Debian and Ubuntu the package python3-venv), or name another Python with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
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

# One by one, because a peer that cannot be installed is a row of the table and no reason to stop.
$(PEERS_READY): pyproject.toml benchmarks/peers/requirements.txt benchmarks/peers/requirements-alone.txt .venv-peers/.torch
	$(PIP) install $(PIP_ARGS) "$(TORCH)" --editable .
	@while read -r peer; do case "$$peer" in ""|"#"*) continue;; esac; \
	  $(PIP) install $(PIP_ARGS) "$(TORCH)" "$$peer" || echo "not installed: $$peer" >&2; \
	done < benchmarks/peers/requirements.txt
	@while read -r peer; do case "$$peer" in ""|"#"*) continue;; esac; \
	  $(PIP) install $(PIP_ARGS) --no-deps "$$peer" || echo "not installed: $$peer" >&2; \
	done < benchmarks/peers/requirements-alone.txt
	@touch $@
