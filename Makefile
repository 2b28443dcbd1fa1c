# make quickstart: the whole flow on a real model, on a CPU.  make test: the test suite.  make help: the rest.
# Both make the virtual environment first, if it is not there.  make test-lmms-eval: the benchmarks with lmms-eval itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The torch that this release is tested with; make TORCH=... for another. A CPU build is enough.
TORCH ?= 2.13.0
STAMP := $(VENV)/.installed
LMMS_VENV ?= .venv-lmms-eval
LMMS_STAMP := $(LMMS_VENV)/.installed

.PHONY: quickstart quickstart-short test test-all test-lmms-eval bench lint format install clean gpu-check help

help:
	@sed -n 's/^# //p' Makefile; echo; echo "targets: quickstart quickstart-short test test-all test-lmms-eval bench lint format install clean gpu-check"

# What is compiled too: after a pull the kernels must not be those of before.
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

install: $(STAMP)

quickstart: $(STAMP)
	$(BIN)/kore-fast run recipes/quickstart

quickstart-short: $(STAMP)
	$(BIN)/kore-fast run recipes/quickstart/short.yaml

# One process a core: most tests wait for others' work, or compute on one thread.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: $(STAMP)
	$(BIN)/python -m pytest -m ""

# A second environment on top of the first, with what lmms-eval adds, which is much and has its own wishes: it sees the
# first one's torch and kernels, so nothing is compiled or fetched twice, and what it installs the first does not see.
# The first one's pip works here; with torch named no other torchvision is taken than the one that fits it.
$(LMMS_STAMP): pyproject.toml | $(STAMP)
	$(BIN)/python -m venv --clear --without-pip $(LMMS_VENV)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $(LMMS_VENV)/first.pth
	mv $(LMMS_VENV)/first.pth "$$($(LMMS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(LMMS_VENV)/bin/python -m pip install --quiet "kore-fast[lmms-eval]" torch==$(TORCH)
	$(LMMS_VENV)/bin/python -c 'from kore_fast.evaluation.lmms import harness; print("lmms-eval", harness.installed_version())'
	@touch $@

test-lmms-eval: $(LMMS_STAMP)
	$(LMMS_VENV)/bin/python -m pytest -n auto --dist worksteal python_tests/evaluation/lmms \
		python_tests/recipe/test_retention.py python_tests/test_cli_benchmarks.py

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# On a machine with an NVIDIA GPU, offline: build, test and benchmark; rows and logs go to OUT.
OUT ?= build/gpu-check
gpu-check:
	bash benchmarks/gpu_check.sh $(OUT)
