# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help setup demo chat test test-oracle lint fmt kernels cuda gpu stub docs bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e ".[cpu,test,text,plot,lint]"
	@touch $@

setup: $(STAMP)  ## create .venv and install pyggml into it

demo: $(STAMP)  ## run DeepSeek attention in all forms and print memory and errors
	$(BIN)/python examples/deepseek_attention.py

chat: $(STAMP)  ## fetch SmolLM2-135M-Instruct (92 MB) into a cache folder and talk to it
	folder=$$($(BIN)/python tools/fetch.py smollm2) && $(BIN)/pyggml chat -m "$$folder"/*.gguf

# Tests run in a process for each core, at most 8.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8

test: $(STAMP)  ## run the test suite; needs no network, GPU, torch or ggml
	$(PYTEST) -rs -m "not oracle and not kernels and not stub and not gpu"

test-oracle: $(STAMP)  ## install torch, transformers and ggml (LLAMA=--llama: llama.cpp too), and compare with them
	$(BIN)/python tools/install_oracles.py $(LLAMA)
	$(PYTEST) -rs -m oracle

lint: $(STAMP)  ## run ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(STAMP)  ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ARCHS ?= 90a,89,80,100a,120a
kernels: $(STAMP)  ## compile every CUDA kernel without a GPU and test them; fails if a hot one spills
	$(BIN)/python -m pip install -q -e ".[kernels]"
	$(PYTEST) -m kernels
	$(BIN)/python tools/compile_kernels.py -a $(ARCHS) --quiet

PYCUDA := build/pycuda
cuda: $(STAMP)  ## on a GPU machine: install everything that the CUDA backend needs, and check it
	$(BIN)/python -m pip install -q -e ".[cuda]" || { \
		echo "pip could not build pycuda; building it without the CUDA toolkit" \
		&& rm -rf $(PYCUDA) && sh tools/build_pycuda.sh $(BIN)/python $(PYCUDA) \
		&& $(BIN)/python -m pip install -q $(PYCUDA)/pycuda-*.whl \
		&& $(BIN)/python -m pip install -q -e ".[cuda]"; }
	$(BIN)/pyggml doctor

gpu: $(STAMP)  ## the tests that run on a GPU; fails where there is none (first: make cuda)
	$(BIN)/python -m pytest -rs -m gpu tests/gpu

STUB := build/stub
$(STUB)/lib/libcuda.so.1: tools/build_pycuda.sh tools/libcuda_stub.sh | $(STAMP)
	rm -rf $(STUB)
	sh tools/build_pycuda.sh $(BIN)/python $(STUB)
	$(BIN)/python -m pip install -q --target $(STUB)/site $(STUB)/pycuda-*.whl
	PYTHONPATH=$(STUB)/site sh tools/libcuda_stub.sh $(BIN)/python $(STUB)/lib

stub: $(STUB)/lib/libcuda.so.1  ## build pycuda and a fake libcuda, and test errors without a GPU; needs C++
	$(BIN)/python -m pip install -q -e ".[kernels]"
	PYGGML_STUB=$(STUB) $(BIN)/python -m pytest -m stub tests/cuda -rs

docs: $(STAMP)  ## write the API pages to build/docs, from docstrings; a warning is an error
	$(BIN)/python -m pip install -q -e ".[docs]"
	$(BIN)/python tools/api_pages.py build/docs

bench: $(STAMP)  ## run the benchmarks against NumPy, into benchmarks/results/
	$(BIN)/python benchmarks/run.py

clean:  ## remove .venv, build outputs and caches
	rm -rf .venv $(STUB) $(PYCUDA) build/docs .pytest_cache .mypy_cache .ruff_cache .hypothesis
