# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test test-oracle lint kernels stub bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e ".[test,plot,lint]"
	@touch $@

setup: $(STAMP)  ## make .venv and install pyggml into it

demo: $(STAMP)  ## DeepSeek attention in all its forms, with memory and error of each
	$(BIN)/python examples/deepseek_attention.py

test: $(STAMP)  ## the test-suite; needs no network, GPU, torch or ggml
	$(BIN)/python -m pytest -rs -m "not oracle and not kernels and not stub"

test-oracle: $(STAMP)  ## live comparison with torch, transformers and real ggml (installs them)
	$(BIN)/python tools/install_oracles.py
	$(BIN)/python -m pytest -m oracle

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ARCHS ?= 90a,89,80,100a,120a
kernels: $(STAMP)  ## compile every CUDA kernel, with no GPU; fails where a hot one spills; test the cache
	$(BIN)/python -m pip install -q -e ".[kernels]"
	$(BIN)/python -m pytest -m kernels
	$(BIN)/python tools/compile_kernels.py -a $(ARCHS) --quiet

STUB := build/stub
$(STUB)/lib/libcuda.so.1: tools/build_pycuda.sh tools/libcuda_stub.sh | $(STAMP)
	rm -rf $(STUB)
	sh tools/build_pycuda.sh $(BIN)/python $(STUB)
	$(BIN)/python -m pip install -q --target $(STUB)/site $(STUB)/pycuda-*.whl
	PYTHONPATH=$(STUB)/site sh tools/libcuda_stub.sh $(BIN)/python $(STUB)/lib

stub: $(STUB)/lib/libcuda.so.1  ## build pycuda and a libcuda without a GPU, test the errors there (C++)
	$(BIN)/python -m pip install -q -e ".[kernels]"
	PYGGML_STUB=$(STUB) $(BIN)/python -m pytest -m stub tests/cuda -rs

bench: $(STAMP)  ## benchmarks against NumPy, into benchmarks/results/
	$(BIN)/python benchmarks/run.py

clean:  ## remove .venv, what `stub` built and caches
	rm -rf .venv $(STUB) .pytest_cache .mypy_cache .ruff_cache .hypothesis
