# `make bench` and `make test` do all the set-up they need. See README.md.
#
# SGLANG   version of SGLang, of those in patches/ (default: DEFAULT_SGLANG below); each has an environment of its own
# PYTHON   the Python whose SGLang is patched: the active virtual environment, else that of SGLANG (built on demand)
# PROFILE  benchmark profile, one of bench/profiles (default: cpu)
# ARGS     further options for the command behind a target, such as ARGS="--concurrency 1,4"

DEFAULT_SGLANG := 0.5.23
SGLANG ?= $(DEFAULT_SGLANG)
OTHER_SGLANG := $(filter-out $(SGLANG),$(notdir $(wildcard patches/*)))
venv_of = .venv$(if $(filter-out $(DEFAULT_SGLANG),$(1)),-$(1))
VENV := $(call venv_of,$(SGLANG))
PYTHON ?= $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/python,$(VENV)/bin/python)
BOOTSTRAP_PYTHON ?= python3
PROFILE ?= cpu
ARGS ?=
READY := $(VENV)/.ready
PINS := requirements/sglang-$(SGLANG).txt
REQUIREMENTS := requirements/cpu.txt requirements/cpu-nodeps.txt requirements/dev.txt requirements/constraints.txt $(PINS)
# Another version's environment takes all but SGLang and what it pins from the default's, where that is there.
BASE := $(filter-out $(VENV),.venv)
# An editable install only in this checkout's own environment; elsewhere the package must outlive the checkout.
OWN := $(filter $(VENV)/bin/python $(CURDIR)/$(VENV)/bin/python,$(PYTHON))
EVERY_SGLANG := tests/patching/test_series.py tests/server/test_smoke.py
PATCHING := $(PYTHON) -m sglang_eplb_affinity.patching

.PHONY: help setup apply unapply verify refresh status trial bench bench-planner report test test-every test-matrix lint clean
help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

requirements/sglang-%.txt:
	@echo "error: SGLANG=$*: there are series for $(notdir $(wildcard patches/*))" >&2; exit 2

$(READY): $(REQUIREMENTS) pyproject.toml
	@$(BOOTSTRAP_PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: BOOTSTRAP_PYTHON=$(BOOTSTRAP_PYTHON) must be Python 3.11 to 3.13 (the pinned wheels)" >&2; exit 2; }
	sh requirements/install.sh $(BOOTSTRAP_PYTHON) $(SGLANG) $(VENV) $(BASE)
	touch $(READY)

setup: $(if $(OWN),$(READY))  ## build the environment of SGLANG with its CPU engine (only if no other PYTHON is given)

apply: setup  ## patch the SGLang of PYTHON and install this package beside it
	@$(PATCHING) apply --package . $(if $(OWN),--editable)

unapply: setup  ## give SGLang its own files back and remove this package
	@$(PATCHING) unapply --package

verify: setup  ## prove that the series applies exactly and comes off without a trace
	@$(PATCHING) verify

refresh: setup  ## write the series again; TOPIC=name.patch takes edits, WHEEL=file names SGLang's wheel
	@$(PATCHING) refresh $(if $(TOPIC),--topic $(TOPIC)) $(if $(WHEEL),--wheel $(WHEEL))

status: setup  ## what is applied
	@$(PATCHING) status

trial: setup  ## which hunks would apply to another SGLang: ARGS=0.5.24, or its wheel
	@$(PATCHING) trial $(ARGS)

bench: apply  ## the comparison: no EPLB, EPLB, affinity EPLB (PROFILE=cpu without a GPU)
	@$(PYTHON) -m bench run --profile $(PROFILE) $(ARGS)

bench-planner: setup  ## placement quality and planning speed beside SGLang's own algorithms
	@$(PYTHON) -m bench.planner $(ARGS)

report: setup  ## build table, notebook and page of a run again
	@$(PYTHON) -m bench report $(ARGS)

test: apply lint  ## all tests that need no GPU, and what EVERY_SGLANG names on the other SGLang
	@$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)
	@$(if $(OWN),$(foreach other,$(OTHER_SGLANG),\
	  $(MAKE) --no-print-directory test-every SGLANG=$(other) PYTHON=$(call venv_of,$(other))/bin/python))

test-every: apply  ## tests of the series, and a server with two rebalances each way
	@$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(EVERY_SGLANG)

test-matrix: apply  ## the server tests in every combination (about an hour on 2 cores)
	@EPLB_AFFINITY_FULL_MATRIX=1 $(PYTHON) -m pytest tests/server/test_outputs.py $(ARGS)

lint: setup  ## ruff, mypy and the order of layers
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -c 'from importlinter.cli import lint_imports_command as lint; lint()'

clean:
	rm -rf .venv .venv-* .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
