# make search | test | check | bench ...   With PYTHON=python3 an interpreter that has everything is used as it is.
SOURCES := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

ifdef PYTHON
PY := $(PYTHON)
BASE := build/in-place.stamp
TEST := $(BASE)
DEV := $(BASE)
else
VENV := .venv
PY := $(VENV)/bin/python
BASE := $(VENV)/base.stamp
TEST := $(VENV)/test.stamp
DEV := $(VENV)/dev.stamp
endif

.PHONY: setup search test lint types check bench bench-nonlocal bench-sparse bench-metaqnn bench-stages bench-allocation crash-test sanitize clean

setup: $(BASE)

search: $(BASE)
	$(PY) -m rlnas_fast.cli search $(ARGS)

# In two processes: threads that wait must not spin, for the other process wants their core.
test: $(TEST)
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(dir $(PY))clang-format --dry-run --Werror

types: $(DEV)
	$(PY) -m mypy

check: lint types

bench: $(TEST)
	$(PY) benchmarks/bench_search_loop.py --check $(ARGS)
	$(PY) benchmarks/bench_nonlocal_attention.py --check $(ARGS)
	$(PY) benchmarks/bench_masked_matmul.py --check $(ARGS)
	$(PY) benchmarks/bench_tabular.py --check $(ARGS)
	$(PY) benchmarks/bench_meter.py --check $(ARGS)
	$(PY) benchmarks/bench_placement.py --check $(ARGS)

bench-nonlocal: $(TEST)
	$(PY) benchmarks/bench_nonlocal_attention.py --check $(ARGS)

bench-sparse: $(TEST)
	$(PY) benchmarks/bench_masked_matmul.py --check $(ARGS)

bench-metaqnn: $(TEST)
	$(PY) benchmarks/bench_metaqnn.py --check $(ARGS)

bench-stages: $(TEST)
	$(PY) benchmarks/bench_stage_selection.py --check $(ARGS)

bench-allocation: $(TEST)
	$(PY) benchmarks/bench_sparsity_allocation.py --check $(ARGS)

crash-test: $(TEST)
	$(PY) benchmarks/crash_test.py $(ARGS)

sanitize: $(TEST)
	PYTHON=$(PY) scripts/sanitize.sh $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info rlnas_fast/*.so

build/in-place.stamp: $(SOURCES)
	$(PY) setup.py build_ext --inplace
	mkdir -p build && touch $@

$(VENV)/bin/python:
	python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip

# First, because calls of the kernels are compiled for the torch that is there.
.venv/torch.stamp: constraints.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet -c constraints.txt torch
	touch $@

.venv/base.stamp: $(SOURCES) constraints.txt .venv/torch.stamp
	$(PY) -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/test.stamp: $(SOURCES) constraints.txt .venv/torch.stamp
	$(PY) -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@ .venv/base.stamp

.venv/dev.stamp: $(SOURCES) constraints.txt .venv/torch.stamp
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@ .venv/test.stamp .venv/base.stamp
