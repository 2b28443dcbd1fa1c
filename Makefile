# make quickstart: the whole flow on a real model, on a CPU.  make test: the test suite.  make help: the rest.
# Both make the virtual environment first, if it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The torch that this release is tested with; make TORCH=... for another. A CPU build is enough.
TORCH ?= 2.13.0
STAMP := $(VENV)/.installed

.PHONY: quickstart quickstart-short test test-all bench lint format install clean gpu-check help

help:
	@sed -n 's/^# //p' Makefile; echo; echo "targets: quickstart quickstart-short test test-all bench lint format install clean gpu-check"

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
