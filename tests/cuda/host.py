"""Compiling kernels for the host: their sources as C++, and a library of them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pyggml.backends.cuda.device.compiler import KERNELS
from pyggml.backends.cuda.weights import grids

HERE = Path(__file__).parent
_PROBE = "#include <ucontext.h>\n_Float16 f(_Float16 x) { return x + x; }"


def on_host(text: str) -> str:
    """A kernel source with C++ in place of its kinds of PTX. Empty PTX and prefetches are gone, and
    a function's dynamic shared memory is the block's."""
    inside = r"( +)extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];"  # a function
    text = re.sub(inside, r"\1\2* const \3 = (\2*)block->memory.data();", text)
    text = re.sub(r"__shared__ (\w+) (\w+)\[(\w+)\];", r"SHARED(\1, \2, \3);", text)
    text = re.sub(r'asm volatile\("(prefetch[^"]*)?"[^;]*\);', "", text)
    text = re.sub(r'asm volatile\("st\.release.*?\);', "*at = value;", text)
    text = re.sub(
        r'asm( volatile)?\("ld\..*?\);', "std::memcpy(&v, at, sizeof v);", text, flags=re.S
    )
    text = re.sub(r'asm\("rcp\.approx.*?\);', "y = 1 / x;", text)
    text = re.sub(r'asm\("max\.NaN.*?\);', "y = x != x ? x : max(x, 0.0f);", text)
    return re.sub(r'asm\("prmt.*?\);', "r = byte_permutation(a, b, selector);", text, flags=re.S)


def libraries(folder: Path, texts: Mapping[str, str], *options: str) -> list[Any]:
    """One library for each C++ text, which can include the kernels' headers, host.hpp and
    block.hpp. Skips the test if no C++ compiler here supports `_Float16` and fibers."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    for path in (KERNELS / "include").glob("*.cuh"):
        (folder / path.name).write_text(on_host(path.read_text()))
    (folder / grids.HEADER).write_text(grids.header())
    (folder / "mma.cuh").write_text((HERE / "mma_header.hpp").read_text())
    for name in ("cuda_fp16.h", "cuda_bf16.h"):
        (folder / name).touch()
    (folder / "cluster.cuh").write_text("#pragma once\n")  # block.hpp has its words
    flags = ["-std=c++17", "-w", "-shared", "-fPIC", "-I", str(folder), "-I", str(HERE), *options]
    (folder / "probe.cpp").write_text(_PROBE)
    if subprocess.run([compiler, *flags, folder / "probe.cpp", "-o", folder / "probe"]).returncode:
        pytest.skip(f"{compiler} lacks _Float16 or ucontext")
    processes = {}
    for name, text in texts.items():
        (folder / f"{name}.cpp").write_text(text)
        command = [compiler, *flags, folder / f"{name}.cpp", "-o", folder / name]
        processes[name] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for process in processes.values():
        _, log = process.communicate()
        assert process.returncode == 0, log
    return [ctypes.CDLL(str(folder / name)) for name in processes]
