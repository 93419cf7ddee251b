# Every target sets up what it needs: a fresh clone, Python 3.11 or newer and pip are enough.
#
#   make demo SEED=7 ARGS='…'      another seed, further flags
#   make test PYTHON=python3.12    the Python that the virtual environment is made with
#   make test VENV=.venv-3.12      where it is made

PYTHON ?= python3
VENV ?= .venv

# Relative paths, so that the clone may lie in a directory with spaces in its name.
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := "$(PY)" -m pip --disable-pip-version-check --no-input install -qq --no-compile -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo docs test test-all test-web screenshots check chaos bench clean FORCE

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install: $(STAMP) ## the virtual environment, with the exact versions of constraints.txt

demo: $(STAMP) ## the whole pipeline on a small world, on a CPU: reward model, policy, report
	@"$(VENV)/bin/helpsteer-rloo" demo --config configs/demo.yaml $(if $(SEED),--seed $(SEED)) $(ARGS)

docs: $(STAMP) ## the documentation site, in site/; a warning is an error
	@"$(PY)" -m tools.flags_page
	@"$(VENV)/bin/zensical" build --clean --strict

# Two workers of one thread each; the tests of a file stay on one worker, because they share what it made.
PYTEST := OMP_NUM_THREADS=1 "$(PY)" -m pytest -n 2 --dist loadfile

test: $(STAMP) ## the tests that take seconds
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP) ## every test
	@$(PYTEST) $(ARGS)

WEB_STAMP := $(VENV)/.installed-web

test-web: $(WEB_STAMP) ## the report in a browser: needs Chromium from the distribution's packages, or CHROMIUM=/path/to/it
	@OMP_NUM_THREADS=1 HELPSTEER_RLOO_WEB=required "$(PY)" -m pytest -m web tests/web $(ARGS)

RUNS ?= runs/demo runs/demo2
screenshots: $(WEB_STAMP) ## the README's pictures, of two runs: make screenshots RUNS='runs/demo runs/demo2'
	@"$(PY)" -m tests.web.screenshots $(RUNS)

$(WEB_STAMP): $(STAMP)
	@$(PIP) --no-build-isolation -e '.[web]'
	@touch "$@"

check: $(STAMP) ## lint, format and types
	@"$(PY)" -m ruff check .
	@"$(PY)" -m ruff format --check .
	@"$(PY)" -m pyright --pythonpath "$(PY)"

chaos: $(STAMP) ## a small run killed again and again, against one that nobody disturbed (ARGS='--kills 40 --seed 1')
	@"$(PY)" -m tests.chaos $(ARGS)

bench: $(STAMP) ## the benchmarks
	@if [ -f benchmarks/__main__.py ]; then "$(PY)" -m benchmarks $(ARGS); \
	else echo "error: there is no benchmark here yet (benchmarks/__main__.py is missing)" >&2; exit 1; fi

clean: ## remove the virtual environment, caches and build products; runs/ and models/ stay
	@rm -rf "$(VENV)" build dist site .cache docs/trl-flags.md *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds the directory that it was made in: a virtual environment that was copied here with the tree would go
# on importing the package from the tree it came from, so it is made anew.
INSTALLED_FOR := $(shell cat '$(STAMP)' 2>/dev/null)
ifneq "$(INSTALLED_FOR)" "$(CURDIR)"
$(STAMP): FORCE
endif

# Speed: pip neither compiles bytecode, which takes half of its time, nor sets up a second environment to build in. The
# import at the end proves the installation and compiles what every run loads, even where Python is told not to write
# bytecode at run time.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: there is no '$(PYTHON)'; name a Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1);" \
	       "name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module; install it (on Debian and Ubuntu: the package python3-venv)" >&2; \
	  exit 1; }
	@echo "Installing into $(VENV); this takes one to two minutes, once."
	@[ "$$(cat "$@" 2>/dev/null)" = "$(CURDIR)" ] || "$(PYTHON)" -m venv --clear "$(VENV)"
	@$(PIP) torch setuptools
	@$(PIP) --no-build-isolation -e '.[dev]'
	@PYTHONDONTWRITEBYTECODE= "$(PY)" -W ignore -c 'from trl import RewardTrainer, RLOOTrainer; \
	  import peft, scipy.stats, transformers.models.qwen3.modeling_qwen3'
	@echo "$(CURDIR)" > "$@"
