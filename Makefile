PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# pip takes the CPU build of torch where the index offers one; set TORCH_INDEX to choose a CUDA build.
TORCH_INDEX ?=

LOWEST := .venv-lowest

.PHONY: demo test test-slow test-all lowest lint types docs blocks studies release clean

demo: $(VENV)/installed
	$(BIN)/moeopt demo --out demo-out

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Four at once, as a third of their time is waiting: for leases to end, for servers to come back.
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 4 --dist loadfile -m slow

test-all: test test-slow

# The lowest versions that pyproject.toml states, in an environment of their own.
lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python -m pytest -q -m "not slow" tests/test_genome.py tests/test_racing.py tests/test_study.py \
		tests/test_recipe.py tests/storage/test_spool.py tests/storage/test_optunas_own.py tests/samplers/test_registry.py \
		tests/exporting/test_stock.py tests/test_plan.py

lint: $(VENV)/installed
	$(BIN)/ruff check moeopt studies benchmarks tests docs
	$(BIN)/ruff format --check moeopt studies benchmarks tests docs

types: $(VENV)/installed
	$(BIN)/mypy

# The site, in build/site; a warning is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The code blocks of all Markdown pages, run or checked.
blocks: $(VENV)/installed
	$(BIN)/python tests/run_blocks.py

studies: $(VENV)/installed
	$(BIN)/python tests/run_studies.py

# The wheel and the sdist, in dist/, and the wheel alone in an environment of its own.
release: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python tests/run_wheel.py dist

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(LOWEST)/installed: pyproject.toml tests/lowest.py
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/lowest.txt --editable . pytest hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info demo-out
