PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# pip takes the CPU build of torch where the index offers one; set TORCH_INDEX to choose a CUDA build.
TORCH_INDEX ?=

.PHONY: demo test test-slow test-all lint types readme studies clean

demo: $(VENV)/installed
	$(BIN)/moeopt demo --out demo-out

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

test-all: test test-slow

lint: $(VENV)/installed
	$(BIN)/ruff check moeopt studies benchmarks tests
	$(BIN)/ruff format --check moeopt studies benchmarks tests

types: $(VENV)/installed
	$(BIN)/mypy

readme: $(VENV)/installed
	$(BIN)/python tests/run_readme.py README.md docs/extending.md

studies: $(VENV)/installed
	$(BIN)/python tests/run_studies.py

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
