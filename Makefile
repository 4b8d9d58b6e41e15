# `make` alone prints what there is. Every target makes the environment it needs, in .venv.
#
# To use an environment of your own, say `make test PYTHON=python3` (or VENV= for the python3 of your
# PATH): nothing is then made or installed. pip obeys its own settings and variables as always.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
ifeq ($(origin PYTHON),command line)
READY :=
else ifeq ($(strip $(VENV)),)
PYTHON := python3
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
# For targets that install nothing: the environment if it is there, else the machine's own Python.
PYTHON_AT_HAND := $(if $(READY),$(if $(wildcard $(PYTHON)),$(PYTHON),python3),$(PYTHON))

# Kernels are compiled under a second Triton as well, which has a folder of its own.
SECOND_TRITON := $(if $(READY),$(VENV)/second-triton/.ready)

TESTS ?= tests

# What depends on megatron-core's version, under the newest: parity with one rank and with the golden
# runs, checkpoints, resume and resharding, generation, conversion, context parallelism.
NEWEST_TESTS ?= tests/upstream tests/memory/test_golden_module.py tests/memory/test_mlp.py tests/model \
    tests/data/test_datasets.py tests/data/test_blend.py tests/data/test_tokenizers.py \
    tests/training/test_parity_reference.py tests/training/test_parity_one_rank.py \
    tests/training/test_pipeline.py tests/training/test_context_parallel.py tests/training/test_resume.py \
    tests/training/checkpoint/test_saving.py tests/training/checkpoint/test_resharding.py \
    tests/training/checkpoint/test_optimizer_kinds.py tests/training/checkpoint/test_checksums.py \
    tests/inference/test_generator.py tests/conversion/test_megatron.py
# Of pyenv's, one that is not the chosen one, too.
NEWEST_PYTHON ?= $(shell for python in python3.12 python3.13 $(HOME)/.pyenv/versions/3.1[23].*/bin/python3; do \
    if $$python -c 'import ensurepip' 2>/dev/null; then echo $$python; break; fi; done)
NEWEST := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/megatron-memory/newest-$(shell cksum requirements.txt | cut -d" " -f1)
NEWEST_READY := $(NEWEST)/.ready
# Processes that share the test files; WORKERS=0 runs them one by one, in this process.
WORKERS ?= 2

# Tried in this order; megatron-core has wheels for 3.10 to 3.13.
BASE_PYTHONS ?= python3 python3.12 python3.11 python3.10 python3.13

# Without PYTHONPATH: what lies there is not in the environment.
PIP = env -u PYTHONPATH $(PYTHON) -m pip --disable-pip-version-check

# The checkout comes first, so that an installation elsewhere is never run by mistake.
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: help setup quickstart test test-newest has-newest-python test-slow test-parallel test-large lint bench gpu doctor clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make the environment in .venv and install everything into it
	@echo "Ready: $(PYTHON)"

quickstart: $(READY) ## train a small memory model on real text, resume it, ask it things
	$(PYTHON) examples/quickstart/run.py $(ARGS)

test: $(READY) $(SECOND_TRITON) ## run the tests; fewer with TESTS=tests/memory, more flags with ARGS="-x -v"
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS) $(ARGS)

test-newest: $(NEWEST_READY) ## the tests that the newest megatron-core concerns, on Python 3.12; its environment is kept in the user's cache
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(NEWEST_TESTS) $(ARGS)

test-slow: $(READY) ## the long trials of tests/soak, of which `make test` runs a tenth: kills, damage, hostile files, 10,000 steps
	SOAK=1 $(PYTHON) -m pytest tests/soak --durations=0 -s $(ARGS)

test-parallel: $(READY) ## every pair of parallel settings against one rank, up to 8 processes; 20 minutes on 2 cores
	$(PYTHON) -m pytest tests/parallel -m matrix $(ARGS)

test-large: $(READY) ## a table of more than 2^31 values, saved and loaded: 2 minutes, 5 GiB of memory and of disk
	LARGE_TABLES=1 $(PYTHON) -m pytest tests/memory/test_large_table.py $(ARGS)

lint: $(READY) ## ruff (rules and format), mypy, codespell, bandit (code), pip-audit (packages with known faults)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m codespell_lib
	$(PYTHON) -m bandit -q -c pyproject.toml -r megatron_memory kernels/memory_kernels tools examples
	$(PYTHON) -m pip_audit --local --progress-spinner off

bench: $(READY) ## the kernels' CPU paths against torch's, the training step against the dense model's, preprocessing
	$(PYTHON) kernels/benchmarks/run.py bag retrieval --device cpu $(ARGS)
	$(PYTHON) tools/benchmark.py train-step --rounds 2
	$(PYTHON) tools/benchmark.py preprocess

gpu: ## GPU tests and benchmarks with the Python that is there; installs nothing. REFERENCE= RESULTS= COMMIT=
	@$(PYTHON_AT_HAND) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || { \
	    echo "make gpu: $(PYTHON_AT_HAND) has no torch that sees a GPU; python tools/doctor.py says why" >&2; exit 1; }
	@status=0; run() { echo "$$*"; env "$$@" || status=1; }; \
	run $(PYTHON_AT_HAND) tests/gpu/run_files.py $(ARGS); \
	run $(PYTHON_AT_HAND) kernels/benchmarks/run.py all $(if $(REFERENCE),--reference "$(REFERENCE)") \
	    $(if $(RESULTS),--results "$(RESULTS)") $(if $(COMMIT),--commit "$(COMMIT)"); \
	run $(PYTHON_AT_HAND) tools/benchmark.py train-step --rounds 2; \
	if [ $$status != 0 ]; then echo "make gpu: a test or a benchmark failed, see above" >&2; exit 1; fi

doctor: ## say what is installed, what is missing, and what will be used
	@$(PYTHON_AT_HAND) tools/doctor.py

clean: ## remove the environment, build outputs and caches; your runs stay
	rm -rf .venv build kernels/build ./*.egg-info kernels/*.egg-info .pytest_cache .ruff_cache .mypy_cache

ifneq ($(READY),)
# Written last, so that an interrupted installation starts again.
$(READY): requirements.txt pyproject.toml
	@python= ; for candidate in $(BASE_PYTHONS); do \
	    if $$candidate -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	    then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	    echo "make setup: found no Python 3.10 to 3.13 (tried: $(BASE_PYTHONS))." >&2; \
	    echo "Install one, or name it: make setup BASE_PYTHONS=/path/to/python3" >&2; exit 1; fi; \
	if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	    version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	    echo "make setup: $$python cannot make environments, its venv module is missing." >&2; \
	    echo "On Debian and Ubuntu: sudo apt install python$$version-venv" >&2; exit 1; fi; \
	if [ -e $(VENV) ] && [ ! -e $(VENV)/pyvenv.cfg ]; then \
	    echo "make setup: $(VENV) exists and is no Python environment; name another: VENV=DIR" >&2; exit 1; fi; \
	if ! $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$($$python --version) ($$(command -v $$python))"; \
	    $$python -m venv --clear $(VENV); fi
	@echo "Installing torch first: a build with CUDA is some gigabytes, a CPU build some 200 MB"
	$(PIP) install "$$(grep '^torch==' requirements.txt)"
	@echo "Installing what requirements.txt lists"
	$(PIP) install -r requirements.txt
	@echo "Installing this checkout: megatron_memory and memory_kernels, editable"
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

has-newest-python:
	@test -n "$(NEWEST_PYTHON)"

# Of a hash of what it holds: another clone, or a change back, finds it again. torch comes with CUDA
# there, 5 GB in all. One that was interrupted is made anew.
$(NEWEST_READY):
	@$(or $(NEWEST_PYTHON),false) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' || { \
	    echo "make test-newest: needs Python 3.12 or 3.13; name it: NEWEST_PYTHON=/path/to/python3.12" >&2; exit 1; }
	rm -rf "$(NEWEST)"
	$(NEWEST_PYTHON) -m venv "$(NEWEST)"
	env -u PYTHONPATH $(NEWEST)/bin/python -m pip --disable-pip-version-check install -q "$$(grep '^torch==' requirements.txt)"
	env -u PYTHONPATH $(NEWEST)/bin/python -m pip --disable-pip-version-check install -q -r requirements.txt
	@touch "$@"

$(SECOND_TRITON): kernels/benchmarks/compiled/second-triton.txt | $(READY)
	@echo "Installing a second Triton beside the first: kernels are compiled under both"
	rm -rf $(@D)
	mkdir -p $(@D)
	$(PIP) install --no-deps --target $(@D) -r $<
	@touch $@
endif
