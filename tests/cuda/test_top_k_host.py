"""The kernels of top_k for long rows, compiled for the host, against a stable sort.

All eight blocks of a cluster run at the same time, thread by thread.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml.backends.cuda import top_k
from pyggml.backends.cuda.device.compiler import KERNELS
from pyggml.backends.cuda.gpu import H200
from pyggml.backends.cuda.launch import Call, Operand
from tests.cuda.host import libraries

HERE = Path(__file__).parent
RUN = """
extern "C" int top_k_on_host(const char* name, int grid, int threads, int shared, Tensor out,
                             Tensor a) {
    const std::string kernel(name);
    if (kernel == "top_k<1>") launch({grid, 1, 1}, threads, [&] { top_k<1>(out, a); }, shared);
    else if (kernel == "top_k<4>") launch({grid, 1, 1}, threads, [&] { top_k<4>(out, a); }, shared);
    else if (kernel == "top_k_cluster<1, 8>")
        launch({grid, 1, 1}, threads, [&] { top_k_cluster<1, 8>(out, a); }, shared, CLUSTER);
    else if (kernel == "top_k_cluster<4, 2>")
        launch({grid, 1, 1}, threads, [&] { top_k_cluster<4, 2>(out, a); }, shared, CLUSTER);
    else if (kernel == "top_k_cluster<4, 6>")
        launch({grid, 1, 1}, threads, [&] { top_k_cluster<4, 6>(out, a); }, shared, CLUSTER);
    return sizeof(Shared);
}
"""


LIST = """
extern "C" int top_k_on_host(const char* name, int grid, int threads, int shared, Tensor out,
                             Tensor a) {
    const std::string kernel(name);
    if (kernel == "top_k_list<1>")
        launch({grid, 1, 1}, threads, [&] { top_k_list<1>(out, a); }, shared);
    else if (kernel == "top_k_list<4>")
        launch({grid, 1, 1}, threads, [&] { top_k_list<4>(out, a); }, shared);
    else if (kernel == "top_k_list_cluster<2>")
        launch({grid, 1, 1}, threads, [&] { top_k_list_cluster<2>(out, a); }, shared, CLUSTER);
    else if (kernel == "top_k_list_cluster<4>")
        launch({grid, 1, 1}, threads, [&] { top_k_list_cluster<4>(out, a); }, shared, CLUSTER);
    else if (kernel == "top_k_list_cluster<12>")
        launch({grid, 1, 1}, threads, [&] { top_k_list_cluster<12>(out, a); }, shared, CLUSTER);
    return sizeof(State);
}
"""
WORDS = """
#include <string>
#define __cluster_dims__(...)
#define __CUDA_ARCH__ 800
using u64 = unsigned long long;
inline void begin() {}
inline int __ffs(int x) { return __builtin_ffs(x); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A library for each file of kernels."""
    texts = {"top_k": RUN, "top_k_list": LIST}
    for file, run in texts.items():
        parts = [(HERE / name).read_text() for name in ("block.hpp", "host.hpp")]
        parts += [WORDS]
        parts += [(KERNELS / "include" / name).read_text() for name in ("common.cuh", "sort.cuh")]
        kernels = (KERNELS / f"{file}.cu").read_text()
        parts += [kernels.replace("#if __CUDA_ARCH__ >= 900", "#if 1"), run]
        text = re.sub(r'#include ".*|#include <cuda.*|#pragma once', "", "\n".join(parts))
        memory = "char* memory = block->memory.data();"
        texts[file] = re.sub(r"extern __shared__ __align__\(16\) char memory\[\];", memory, text)
    made = libraries(tmp_path_factory.mktemp("top_k"), texts, "-O1")
    return dict(zip(texts, made))


def chosen(
    library: dict[str, Any], rows: NDArray[np.float32], k: int, few: bool, listed: bool = False
) -> NDArray[np.int32]:
    """The ids that the kernel which the backend records finds for rows [n_rows, n]."""
    node = gg.top_k(gg.input("a", ne=rows.shape[::-1]), k=k)
    ids = np.full((len(rows), k), -1, np.int32)
    a, out = (
        Operand(x.ctypes.data, n.ne, (*x.strides[::-1], x.strides[0], x.strides[0]), n.dtype)
        for n, x in ((node["a"], rows), (node, ids))
    )
    call = Call(node, out, {"a": a}, node.attrs, H200)
    top_k.select(call, few, listed)
    (launch,) = call.records
    size = library[launch.file.removesuffix(".cu")].top_k_on_host(
        launch.name.encode(), launch.grid[0], launch.block[0], launch.shared, out.tensor, a.tensor
    )
    assert size == launch.shared
    return ids


def expected(rows: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    return np.stack([np.lexsort((-row, ~np.isnan(row)))[:k] for row in rows])


def data(kind: str, n: int, rng: np.random.Generator) -> NDArray[np.float32]:
    x = rng.standard_normal(n).astype(np.float32)
    if kind == "equal":
        x[:] = 0.5
    elif kind == "whole":
        x = np.rint(3 * x)
    elif kind == "special":
        numbers = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45]
        x[rng.permutation(n)[: n // 2]] = rng.choice(numbers, n // 2)
    elif kind == "hidden":
        x[n // 3 :] = -np.inf
    elif kind == "few":
        x[rng.permutation(n)[7:]] = -np.inf
    elif kind == "outlier":
        x[n // 2] = np.inf
    elif kind == "sorted":
        x.sort()
    elif kind == "crowded":  # all large elements are in few groups of any kernel
        x[np.arange(n) // 4 % 4096 < 256] += 100
    elif kind == "crowded equals":
        x[np.arange(n) // 4 % 4096 < 256] = 100
    return x


KINDS = (
    "random", "equal", "whole", "special", "hidden", "few", "outlier", "sorted", "crowded",
    "crowded equals",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few", [False, True], ids=["block", "cluster"])
def test_the_choice_is_that_of_a_stable_sort(kind: str, few: bool, library: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for n, k in ((20000, 2048), (16387, 513), (100000, 2048)):
        rows = np.stack([data(kind, n, rng)])
        np.testing.assert_array_equal(chosen(library, rows, k, few), expected(rows, k))


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_has_the_ids_of_a_stable_sort(kind: str, library: dict[str, Any]) -> None:
    """In any order, but in the same one in each run: few rows are in that of the elements."""
    rng = np.random.default_rng(0)
    sizes = (20000, 2048), (16387, 513), (16388, 513), (65536, 2048), (163840, 2048)
    for n, k in ((300, 40), (2048, 512), (8192, 2048), (3000, 2999), *sizes):
        few = n >= top_k.LONG
        rows = np.stack([data(kind, n, rng) for _ in range(1 if few else 2)])
        ids = chosen(library, rows, k, few, listed=True)
        np.testing.assert_array_equal(np.sort(ids), np.sort(expected(rows, k)))
        np.testing.assert_array_equal(ids, chosen(library, rows, k, few, listed=True))


def test_short_rows(library: dict[str, Any]) -> None:
    """Rows of a block may be shorter than its groups are many; k may be the whole row."""
    rng = np.random.default_rng(1)
    for n, k in ((1, 1), (5, 5), (130, 1), (2048, 2048), (4099, 2047)):
        for kind in ("random", "special"):
            rows = np.stack([data(kind, n, rng) for _ in range(3)])
            np.testing.assert_array_equal(chosen(library, rows, k, False), expected(rows, k))
