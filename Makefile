# Two commands: `make demo` and `make test`. Each makes .venv, installs what it needs there, and runs.
# Another torch build: make clean test TORCH="torch==2.11.0"; another Python: make clean test PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test lint format clean

demo: .venv/demo
	$(BIN)/python -m unetpp_fast demo --out demo

test: .venv/test
	$(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info demo

# What is installed is remembered as an empty file, made anew when setup.py changes.
.venv/demo .venv/test: .venv/%: setup.py pyproject.toml | .venv/base
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@

.venv/base:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel "$(TORCH)"
	touch $@
