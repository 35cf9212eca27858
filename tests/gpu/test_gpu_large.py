"""Tensors of more than 2^31 elements on a GPU. A few of their rows are compared.

Values repeat with a prime period, so that an offset truncated to 31 or 32 bits reads other values.
K and V have different periods; otherwise all heads would have the same keys in another order.
Needs 20 GB on the GPU and 15 GB on the host.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml.dtypes import dtype
from pyggml.quants import decode_rows, encode_rows
from tests.gpu.checks import rows_apart

Array = NDArray[Any]

#: Elements of a row, and number of rows.
ROW, ROWS = 4096, 540_000
#: Rows to compare: the first, the last, and those around 2^30 and 2^31 elements.
CHECKED = (0, 1, 262_143, 262_144, 524_287, 524_288, ROWS - 1)
#: Periods of the values, in elements or blocks.
PRIME, OTHER = 100_003, 99_991
#: Largest relative error of a row.
MOST = 1e-2


def pattern(name: str, shape: tuple[int, ...], period: int = PRIME) -> Array:
    """Stored values of a type, in NumPy shape (block types: rows of bytes)."""
    rng, block = np.random.default_rng(period), dtype(name).block
    base = rng.standard_normal(period * block).astype(np.float32)
    if block == 1:
        return np.resize(base.astype(np.dtype(dtype(name).numpy)), shape)
    rows = (*shape[:-1], dtype(name).row_bytes(shape[-1]))
    return np.resize(encode_rows(dtype(name), base), rows)


def values(name: str, stored: Array) -> Array:
    """Stored values as f32."""
    if dtype(name).block == 1:
        return stored.astype(np.float32)
    return decode_rows(dtype(name), np.ascontiguousarray(stored))


def run(outputs: dict[str, gg.Node], inputs: dict[str, Array]) -> dict[str, Array]:
    results = gg.compile(outputs, backends=["cuda"]).run(inputs)
    gc.collect()  # the next test needs the memory
    return results


@pytest.mark.parametrize(("name", "weight"), [("f16", False), ("q8_0", False), ("q8_0", True)])
def test_matrix(name: str, weight: bool) -> None:
    """A matrix of 2.2e9 elements: rows, products with 1 and 16 columns, and adding a row."""
    stored = pattern(name, (ROWS, ROW))
    rng = np.random.default_rng(2)
    b = rng.standard_normal((16, ROW)).astype(np.float32)
    added = rng.standard_normal(ROW).astype(np.float16)
    if weight:
        a = gg.constant(stored, dtype=name, name="a")
    else:
        a = gg.input("a", name, ne=(ROW, ROWS))
    x, ids = gg.input("x", ne=(ROW, 16)), gg.input("ids", "i32", ne=(len(CHECKED),))
    outputs = {"one": gg.mul_mat(a, gg.view(x, ne=(ROW, 1))), "many": gg.mul_mat(a, x)}
    inputs = {"x": b}
    if not weight:  # get_rows would keep the weight in the layout of the file
        outputs["rows"] = gg.get_rows(a, ids)
        inputs |= {"a": stored, "ids": np.array(CHECKED, np.int32)}
    if name == "f16":
        outputs["sum"] = gg.get_rows(gg.add(a, gg.input("row", "f16", ne=(ROW,))), ids)
        inputs["row"] = added
    results = run(outputs, inputs)
    rows = values(name, stored[list(CHECKED)])
    product = b.astype(np.float64) @ rows.astype(np.float64).T
    rows_apart("1 column", results["one"][..., CHECKED].reshape(1, -1), product[:1], MOST)
    rows_apart("16 columns", results["many"][:, CHECKED], product, MOST)
    if "rows" in results:
        rows_apart("rows", results["rows"], rows, 0.0)
    if "sum" in results:
        rows_apart("sum", results["sum"], rows + added.astype(np.float32), 1e-3)


@pytest.mark.parametrize("name", ["f16", "q8_0"])
def test_result(name: str) -> None:
    """A product of 2.2e9 elements, read by rows."""
    m, n, k = 65_536, 33_000, 64
    stored = pattern(name, (m, k))
    b = pattern("f32", (n, k), OTHER)
    checked = [0, 16_384, 32_767, 32_768, n - 1]  # row 32,768 begins at element 2^31
    a, ids = gg.constant(stored, dtype=name, name="a"), gg.input("ids", "i32", ne=(len(checked),))
    y = gg.get_rows(gg.mul_mat(a, gg.input("b", ne=(k, n))), ids)
    rows = run({"y": y}, {"b": b, "ids": np.array(checked, np.int32)})["y"]
    expected = b[checked].astype(np.float64) @ values(name, stored).astype(np.float64).T
    rows_apart("rows of the product", rows, expected, MOST)


def attended(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Attention of queries [n, d] to keys [n_kv, d] in float64, the keys in pieces."""
    top = np.full((len(q), 1), -np.inf)
    total, out = np.zeros((len(q), 1)), np.zeros((len(q), v.shape[-1]))
    for i in range(0, len(k), 1 << 17):
        s = scale * (q @ k[i : i + (1 << 17)].astype(np.float32).T)
        new = np.maximum(top, s.max(axis=1, keepdims=True))
        p, factor = np.exp(s - new), np.exp(top - new)
        total = total * factor + p.sum(axis=1, keepdims=True)
        out = out * factor + p.astype(np.float32) @ v[i : i + (1 << 17)].astype(np.float32)
        top = new
    return out / total


def test_attention() -> None:
    """17 heads of 2^20 keys, so K and V have 2.3e9 elements each; with 1 and 64 queries."""
    n_kv, heads, d = 1 << 20, 17, 128
    k, v = (pattern("f16", (heads, n_kv, d), period) for period in (PRIME, OTHER))
    for n in (1, 64):
        q = np.random.default_rng(n).standard_normal((heads, n, d)).astype(np.float32)
        nodes = [gg.input(x, t, ne=a.shape[::-1])
                 for x, t, a in (("q", "f32", q), ("k", "f16", k), ("v", "f16", v))]  # fmt: skip
        y = gg.flash_attn_ext(*nodes, scale=d**-0.5)
        out = run({"y": y}, {"q": q, "k": k, "v": v})["y"].reshape(n, heads, d)
        for head in (0, 15, 16):  # head 16 begins at element 2^31
            queries = sorted({0, n - 1})
            expected = attended(q[head, queries], k[head], v[head], d**-0.5)
            rows_apart(f"{n} queries, head {head}", out[queries, head], expected, MOST)


def test_latent_attention() -> None:
    """One head with 3.8e6 keys of 576 (2.2e9 elements). V is the first 512 of each."""
    n_kv, heads, d = 3_800_000, 16, 576
    k = pattern("f16", (1, n_kv, d), 2_000_003)
    q = np.random.default_rng(8).standard_normal((heads, 1, d)).astype(np.float32)
    cache = gg.input("k", "f16", ne=(d, n_kv, 1))
    v = gg.view(cache, ne=(512, n_kv, 1))
    y = gg.flash_attn_ext(gg.input("q", ne=(d, 1, heads)), cache, v, scale=192**-0.5)
    out = run({"y": y}, {"q": q, "k": k})["y"].reshape(heads, 512)
    rows_apart("heads", out, attended(q[:, 0], k[0], k[0, :, :512], 192**-0.5), MOST)
