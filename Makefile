# Each target works alone from a fresh clone: it makes the virtual environment .venv with what it needs.
# `make demo PYTHON=python3.12` chooses the interpreter; 3.11 to 3.13 are supported.

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
ifndef PYTHON
PYTHON := $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell $(p) -c '$(SUPPORTED)' 2>/dev/null && echo $(p))))
endif

VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench soak fuzz simulate

demo: $(VENV)/.installed-demo
	$(BIN)/rewardq demo

# Two files of tests at once: most of the time they wait for processes that they have killed.
test: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.judges

# Faults, then a long run: `make soak SAMPLES=100000 LARGE=1000` is a shorter one.
SAMPLES ?= 1000000
LARGE ?= 10000
soak: $(VENV)/.installed-dev
	$(BIN)/pytest -m soak -n 2 --dist load --maxschedchunk 1 tests/soak/test_faults.py
	SOAK_SAMPLES=$(SAMPLES) SOAK_LARGE=$(LARGE) $(BIN)/pytest -m soak tests/soak/test_long_run.py

# Hostile input by chance, for so many minutes together. `python -m tests.fuzz --only bodies` runs one fuzzer.
MINUTES ?= 10
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --write

# Schedules of the simulation: `make simulate SEEDS=0..1000000`. One: `python -m tests.simulation.run --trace 1234`.
SEEDS ?= 0..20000
JOBS ?= 2
simulate: $(VENV)/.installed-dev
	$(BIN)/python -m tests.simulation.run --seeds $(SEEDS) --jobs $(JOBS)

# One stamp for each set of extras, so that a second run installs nothing.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing rewardq[$*] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "needs Python 3.11, 3.12 or 3.13; name it: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13"; exit 1; }
	$(PYTHON) -m venv $(VENV)
