# setup  virtual environment .env with everything pinned (login node or laptop)
# demo   lose a node and train on, on a real Slurm on this machine (about 2 minutes; not root: without Slurm)
# test   lint, types, shell checks and every test (root: it starts a sandbox)
# unit   the fast tests alone
# clean  remove what the above made, except runs

PYTHON ?= python3
BIN := .env/bin

.PHONY: setup demo test unit lint format clean

setup: .env/.installed

.env/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .env || { apt-get update -q && apt-get install -y -q python3-venv && $(PYTHON) -m venv .env; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.env/.installed-for-tests: .env/.installed tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

demo: setup
	$(BIN)/python -m launcher demo

lint: .env/.installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x *.sh slurm/*.s* .ci/run

unit: .env/.installed-for-tests
	$(BIN)/python -m pytest tests/unit

test: lint
	$(BIN)/python -m launcher sandbox install
	$(BIN)/python -m pytest

format: .env/.installed-for-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .env .pytest_cache .mypy_cache .ruff_cache .hypothesis outputs/assets
