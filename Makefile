# Every target works on a fresh machine: it makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-quick test check format bench bench-full install clean

demo: install            ## the three phases for real: about ten minutes on two cores
	$(BIN)/bamoe demo demo

demo-quick: install      ## the same code on almost no tokens
	$(BIN)/bamoe demo demo-quick --quick

test: install            ## the whole test suite
	$(BIN)/pytest -n auto

check: install           ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install           ## speed and memory beside peers and limits: at most ten minutes on two quiet cores
	$(BIN)/python benchmarks/speed/bench.py bench

bench-full: install      ## the same with more sizes and turns
	$(BIN)/python benchmarks/speed/bench.py bench --full

install: $(INSTALLED)    ## .venv with the package and its development tools

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) demo demo-quick bench
