"""Tensors of more than 2^31 elements on a GPU, looked at in a handful of their rows.

Values repeat with a prime period, so that an offset that is cut to 31 or 32 bits finds others; K
and V with two, or the keys of one head would be those of another in another order.
Takes 20 GB of the GPU and 15 of the host.
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

#: Elements of a row, rows, and rows to look at: around 2^30, 2^31 elements, the first and the last.
ROW, ROWS = 4096, 540_000
SOME = (0, 1, 262_143, 262_144, 524_287, 524_288, ROWS - 1)
#: Periods of values, in elements or blocks.
PRIME, OTHER = 100_003, 99_991
#: Relative error of a row.
MOST = 1e-2


def pattern(kind: str, shape: tuple[int, ...], period: int = PRIME) -> Array:
    """Values of a type as they are stored, of NumPy shape (block types: rows of bytes)."""
    rng, block = np.random.default_rng(period), dtype(kind).block
    base = rng.standard_normal(period * block).astype(np.float32)
    if block == 1:
        return np.resize(base.astype(np.dtype(dtype(kind).numpy)), shape)
    rows = (*shape[:-1], dtype(kind).row_bytes(shape[-1]))
    return np.resize(encode_rows(dtype(kind), base), rows)


def values(kind: str, stored: Array) -> Array:
    """Some of them as f32."""
    if dtype(kind).block == 1:
        return stored.astype(np.float32)
    return decode_rows(dtype(kind), np.ascontiguousarray(stored))


def run(outputs: dict[str, gg.Node], given: dict[str, Array]) -> dict[str, Array]:
    results = gg.compile(outputs, backends=["cuda"]).run(given)
    gc.collect()  # the next test needs the memory
    return results


@pytest.mark.parametrize(("kind", "weight"), [("f16", False), ("q8_0", False), ("q8_0", True)])
def test_matrix(kind: str, weight: bool) -> None:
    """A matrix of 2.2e9 elements: its rows, products with 1 and 16 columns, a sum with a row."""
    stored = pattern(kind, (ROWS, ROW))
    rng = np.random.default_rng(2)
    b = rng.standard_normal((16, ROW)).astype(np.float32)
    added = rng.standard_normal(ROW).astype(np.float16)
    if weight:
        a = gg.constant(stored, dtype=kind, name="a")
    else:
        a = gg.input("a", kind, ne=(ROW, ROWS))
    x, ids = gg.input("x", ne=(ROW, 16)), gg.input("ids", "i32", ne=(len(SOME),))
    outputs = {"one": gg.mul_mat(a, gg.view(x, ne=(ROW, 1))), "many": gg.mul_mat(a, x)}
    given = {"x": b}
    if not weight:  # one whose rows are read is kept as in the file, not in tiles
        outputs["rows"] = gg.get_rows(a, ids)
        given |= {"a": stored, "ids": np.array(SOME, np.int32)}
    if kind == "f16":
        outputs["sum"] = gg.get_rows(gg.add(a, gg.input("row", "f16", ne=(ROW,))), ids)
        given["row"] = added
    got = run(outputs, given)
    rows = values(kind, stored[list(SOME)])
    product = b.astype(np.float64) @ rows.astype(np.float64).T
    rows_apart("1 column", got["one"][..., SOME].reshape(1, -1), product[:1], MOST)
    rows_apart("16 columns", got["many"][:, SOME], product, MOST)
    if "rows" in got:
        rows_apart("rows", got["rows"], rows, 0.0)
    if "sum" in got:
        rows_apart("sum", got["sum"], rows + added.astype(np.float32), 1e-3)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_result(kind: str) -> None:
    """A product of 2.2e9 elements, read by rows."""
    m, n, k = 65_536, 33_000, 64
    stored = pattern(kind, (m, k))
    b = pattern("f32", (n, k), OTHER)
    some = [0, 16_384, 32_767, 32_768, n - 1]  # row 32,768 begins at element 2^31
    a, ids = gg.constant(stored, dtype=kind, name="a"), gg.input("ids", "i32", ne=(len(some),))
    y = gg.get_rows(gg.mul_mat(a, gg.input("b", ne=(k, n))), ids)
    got = run({"y": y}, {"b": b, "ids": np.array(some, np.int32)})["y"]
    want = b[some].astype(np.float64) @ values(kind, stored).astype(np.float64).T
    rows_apart("rows of the product", got, want, MOST)


def attended(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Attention of queries [n, d] to keys [n_kv, d] in float64, the keys in pieces."""
    top = np.full((len(q), 1), -np.inf)
    total, out = np.zeros((len(q), 1)), np.zeros((len(q), v.shape[-1]))
    for i in range(0, len(k), 1 << 17):
        s = scale * (q @ k[i : i + (1 << 17)].astype(np.float32).T)
        new = np.maximum(top, s.max(axis=1, keepdims=True))
        p, kept = np.exp(s - new), np.exp(top - new)
        total = total * kept + p.sum(axis=1, keepdims=True)
        out = out * kept + p.astype(np.float32) @ v[i : i + (1 << 17)].astype(np.float32)
        top = new
    return out / total


def test_attention() -> None:
    """17 heads of 2^20 keys: K and V of 2.3e9 elements each; 1 query and 64."""
    n_kv, heads, d = 1 << 20, 17, 128
    k, v = (pattern("f16", (heads, n_kv, d), period) for period in (PRIME, OTHER))
    for n in (1, 64):
        q = np.random.default_rng(n).standard_normal((heads, n, d)).astype(np.float32)
        nodes = [gg.input(x, t, ne=a.shape[::-1])
                 for x, t, a in (("q", "f32", q), ("k", "f16", k), ("v", "f16", v))]  # fmt: skip
        y = gg.flash_attn_ext(*nodes, scale=d**-0.5)
        got = run({"y": y}, {"q": q, "k": k, "v": v})["y"].reshape(n, heads, d)
        for head in (0, 15, 16):  # head 16 begins at element 2^31
            some = sorted({0, n - 1})
            want = attended(q[head, some], k[head], v[head], d**-0.5)
            rows_apart(f"{n} queries, head {head}", got[some, head], want, MOST)


def test_latent_attention() -> None:
    """One head of 3.8e6 keys of 576, V their first 512: 2.2e9 elements in one head."""
    n_kv, heads, d = 3_800_000, 16, 576
    k = pattern("f16", (1, n_kv, d), 2_000_003)
    q = np.random.default_rng(8).standard_normal((heads, 1, d)).astype(np.float32)
    cache = gg.input("k", "f16", ne=(d, n_kv, 1))
    v = gg.view(cache, ne=(512, n_kv, 1))
    y = gg.flash_attn_ext(gg.input("q", ne=(d, 1, heads)), cache, v, scale=192**-0.5)
    got = run({"y": y}, {"q": q, "k": k})["y"].reshape(heads, 512)
    rows_apart("heads", got, attended(q[:, 0], k[0], k[0, :, :512], 192**-0.5), MOST)
