# `make bench` and `make test` do all the set-up they need. See README.md.
#
# PYTHON   the Python whose SGLang is patched: the active virtual environment, else .venv (built on demand)
# PROFILE  benchmark profile, one of bench/profiles (default: cpu)
# ARGS     further options for the command behind a target, such as ARGS="--concurrency 1,4"

VENV := .venv
PYTHON ?= $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/python,$(VENV)/bin/python)
BOOTSTRAP_PYTHON ?= python3
PROFILE ?= cpu
ARGS ?=
READY := $(VENV)/.ready
REQUIREMENTS := requirements/cpu.txt requirements/cpu-nodeps.txt requirements/dev.txt requirements/constraints.txt
# An editable install only in this checkout's own environment; elsewhere the package must outlive the checkout.
OWN := $(filter $(VENV)/bin/python $(CURDIR)/$(VENV)/bin/python,$(PYTHON))
INSTALL := $(PYTHON) -m pip install -qq --disable-pip-version-check --no-deps $(if $(OWN),-e) .
PATCHING := $(PYTHON) -m sglang_eplb_affinity.patching

.PHONY: help setup apply unapply verify refresh status bench bench-planner report test test-matrix lint clean
help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

$(READY): $(REQUIREMENTS) pyproject.toml
	@$(BOOTSTRAP_PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: BOOTSTRAP_PYTHON=$(BOOTSTRAP_PYTHON) must be Python 3.10 to 3.13 (SGLang 0.5.17's wheels)" >&2; exit 2; }
	test -x $(VENV)/bin/python || $(BOOTSTRAP_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check "setuptools>=77,<82" wheel
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile torch==2.13.0
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile -c requirements/constraints.txt \
	  -r requirements/cpu.txt -r requirements/dev.txt
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile --no-deps \
	  -c requirements/constraints.txt -r requirements/cpu-nodeps.txt
	@# On all cores, which pip does not use; a few packages carry files that do not compile.
	$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $(READY)

setup: $(if $(OWN),$(READY))  ## build .venv with SGLang's CPU engine (only if no other PYTHON is given)

apply: setup  ## patch the SGLang of PYTHON and install this package beside it
	@$(PATCHING) apply
	@$(INSTALL) --no-build-isolation || $(INSTALL)

unapply: setup  ## give SGLang its own files back and remove this package
	@$(PATCHING) unapply
	@$(PYTHON) -m pip uninstall -q -y --disable-pip-version-check sglang-eplb-affinity

verify: setup  ## prove that the series applies exactly and comes off without a trace
	@$(PATCHING) verify

refresh: setup  ## write the series again; TOPIC=name.patch takes edits, WHEEL=file names SGLang's wheel
	@$(PATCHING) refresh $(if $(TOPIC),--topic $(TOPIC)) $(if $(WHEEL),--wheel $(WHEEL))

status: setup  ## what is applied
	@$(PATCHING) status

bench: apply  ## the comparison: no EPLB, EPLB, affinity EPLB (PROFILE=cpu without a GPU)
	@$(PYTHON) -m bench run --profile $(PROFILE) $(ARGS)

bench-planner: setup  ## placement quality and planning speed beside SGLang's own algorithms
	@$(PYTHON) -m bench.planner $(ARGS)

report: setup  ## build table, notebook and page of a run again
	@$(PYTHON) -m bench report $(ARGS)

test: apply lint  ## all tests that need no GPU
	@$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-matrix: apply  ## the server tests in every combination (about an hour on 2 cores)
	@EPLB_AFFINITY_FULL_MATRIX=1 $(PYTHON) -m pytest tests/server/test_outputs.py $(ARGS)

lint: setup  ## ruff, mypy and the order of layers
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -c 'from importlinter.cli import lint_imports_command as lint; lint()'

clean:
	rm -rf $(VENV) .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
