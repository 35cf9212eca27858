"""What a prompt needs besides its large products: kernels run on the host against the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda.gpu import H200
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.backends.cuda.linear import experts
from pyggml.dtypes import F32, I32
from tests.cuda.compared import Graph, compare, compare_all, random, rng
from tests.cuda.emulated import run_all, starter

#: On which a block has as many tokens as it can.
ONE = replace(H200, sms=1)
SIZES = (
    (64, 2048, 40),
    (70, 260, 133),  # rows and columns in several blocks, a chain that is not full
    (3, 100, 9),
    (33, 63, 80),  # no words of four
    (200, 1100, 1030),  # eight warps; k in parts of several splits
    (256, 12800, 9),  # four tiles of rows, parts of 256
)


def product(rows: int, k: int, columns: int, weights: Any = None, **attrs: Any) -> Graph:
    """A product whose columns and values of k differ in size."""
    x = random(columns, k) * np.exp(3 * random(columns, 1)) * np.exp(random(1, k))
    w = random(rows, k) if weights is None else weights
    y = gg.mul_mat(gg.constant(w, name=f"w{rows}"), gg.input("x", ne=(k, columns)), **attrs)
    return {"y": y}, {"x": x.astype(np.float32)}


@pytest.mark.parametrize("shared", (H200.shared, 99 << 10))
def test_products_of_few_rows(shared: int, tmp_path: Path) -> None:
    """Columns are copied four chains ahead, or as many as shared memory holds: one or two."""
    graphs = {str(sizes): product(*sizes) for sizes in SIZES}
    compare_all(graphs, tmp_path, 1e-12, replace(H200, shared=shared))


def test_products_of_few_rows_of_other_types(tmp_path: Path) -> None:
    """Weights of f16 with prec="f32", weights that are computed, heads of columns that lie
    anywhere, results in f16."""
    k, n = 192, 20
    half = product(50, k, n, random(50, k).astype(np.float16), prec="f32")
    w, x = gg.input("w", ne=(k, 40)), gg.input("x", ne=(k, 5, n))
    turned = gg.permute(x, axes=(0, 2, 1, 3))
    b = gg.input("b", "f16", ne=(k, n))
    outputs = {
        "computed": gg.mul_mat(gg.scale(w, s=2.0), turned),
        "f16": gg.mul_mat(w, gg.reshape(x, ne=(k, 5 * n)), dtype="f16"),
        "of_f16": gg.mul_mat(w, b),
    }
    inputs = {"w": random(40, k), "x": random(n, 5, k), "b": random(n, k).astype(np.float16)}
    graphs = {name: ({name: y}, inputs_of(y, inputs)) for name, y in outputs.items()}
    compare_all({"half": half} | {n: graphs[n] for n in ("computed", "of_f16")}, tmp_path, 1e-12)
    compare(*graphs["f16"], folder(tmp_path, "f16"), 1e-6)


def inputs_of(node: gg.Node, inputs: dict[str, Any]) -> dict[str, Any]:
    names = gg.compile({"": node}, backends=["numpy"]).inputs
    return {name: values for name, values in inputs.items() if name in names}


def folder(path: Path, name: str) -> Path:
    """A folder inside; a library is loaded only once from a path."""
    (path / name).mkdir()
    return path / name


def test_numbers_that_are_not_finite_or_do_not_fit(tmp_path: Path) -> None:
    """A column with NaN and one with infinity leave the others alone; products of large and of
    small numbers, and sums that are too large."""
    (y, inputs), k = product(70, 260, 40), 260
    w, x = random(70, k), inputs["x"]
    x[5, 7], x[7, 3], x[8, 200], w[1, 9] = np.nan, np.inf, -np.inf, 1e38
    x[-1] *= 1e-30
    x[-3] *= 1e30
    y = {"y": gg.mul_mat(gg.constant(w, name="w"), gg.input("x", ne=(k, 40)))}
    (result,) = run_all([(y, inputs)], tmp_path)
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(np.float64) @ w.T.astype(np.float64)
        rounded = want.astype(np.float32)
    np.testing.assert_array_equal(np.isfinite(result["y"]), np.isfinite(rounded))
    special = ~np.isfinite(rounded)
    np.testing.assert_array_equal(result["y"][special], rounded[special])
    for column in np.flatnonzero(~special.all(1)):
        seen = ~special[column]
        error = result["y"][column, seen] - want[column, seen]
        assert (error**2).sum() <= 1e-12 * (want[column, seen] ** 2).sum(), column


@pytest.mark.parametrize(("n", "k"), [(64, 4096), (70, 1300)])
def test_routing_adds_up_the_sums_of_the_router(n: int, k: int, tmp_path: Path) -> None:
    """32 and 11 splits; softmax, and sigmoid with a bias and divided weights."""
    tokens, used = 40, 6
    x, w = gg.input("x", ne=(k, tokens)), gg.constant(random(n, k), name=f"w{n}")
    graphs = {}
    for name in ("softmax", "sigmoid"):
        scores = gg.mul_mat(w, x)
        probs = gg.soft_max(scores) if name == "softmax" else gg.sigmoid(scores)
        bias = gg.constant(random(n), name=f"bias{n}")
        ids = gg.top_k(probs if name == "softmax" else gg.add(probs, bias), k=used)
        weights = gg.get_rows(gg.reshape(probs, ne=(1, n, tokens)), ids)
        if name == "sigmoid":
            weights = gg.reshape(weights, ne=(used, tokens))
            weights = gg.div(weights, gg.clamp(gg.sum_rows(weights), min=1e-6, max=1e6))
        outputs = {"weights": gg.scale(weights, s=2.0), "ids": ids}
        steps = gg.compile(outputs, backends=["cuda:0:24GiB"]).steps
        assert scores in next(step for step in steps if outputs["weights"] in step.nodes).nodes
        graphs[name] = outputs, {"x": random(tokens, k)}
    compare_all(graphs, tmp_path, 1e-10)


@pytest.mark.parametrize("mode", ("neox", "normal"))
@pytest.mark.parametrize(("n_dims", "offset", "heads"), [(64, 0, 3), (8, 4, 1), (600, 0, 2)])
def test_rotation_of_many_tokens(
    mode: str, n_dims: int, offset: int, heads: int, tmp_path: Path
) -> None:
    """In place, for 128 and 141 tokens, one and more in a block; more pairs than it has threads;
    factors."""
    n, graphs = n_dims + 12, {}
    for type, tokens in (("f32", 141), ("f16", 128)):
        x, pos = gg.input("x", type, ne=(n, heads, tokens)), gg.input("pos", "i32", ne=(tokens,))
        factors = gg.input("factors", ne=(n_dims // 2,))
        attrs: dict[str, Any] = {"n_dims": n_dims, "mode": mode, "offset": offset}
        y = gg.rope_ext(gg.scale(x, s=2.0), pos, factors, **attrs)
        inputs = {"x": random(tokens, heads, n).astype(x.dtype.numpy)}
        inputs["factors"] = 1 + rng.random(n_dims // 2, dtype=np.float32)
        inputs["pos"] = rng.integers(0, 9000, tokens).astype(np.int32)
        graphs[type] = {"y": gg.scale(y, s=1.0)}, inputs
    compare(*graphs["f32"], folder(tmp_path, "f32"), 1e-11, ONE)
    compare(*graphs["f16"], folder(tmp_path, "f16"), 1e-6)


def test_pairs_are_sorted_by_expert(tmp_path: Path) -> None:
    """Runs of one pair, of four, of more than 32; ids of rows that lie apart; no expert, for most
    pairs or none; experts counted by votes or not. Full tiles come first, then what is left of each
    expert, most pairs first."""
    sizes = (6, 9, 5, -2), (3, 1100, 7, -9), (4, 8300, 2, 0), (6, 350, 64, -3), (5, 300, 65, 0)
    for n_used, tokens, n_expert, low in sizes:
        high = n_expert + (low < 0)
        ids = rng.integers(low, high, (tokens, n_used + 1)).astype(np.int32)
        pairs, width = n_used * tokens, experts.columns_for(n_used * tokens, n_expert)
        tiles = experts.most_tiles(pairs, n_expert, width)
        need = experts.group_scratch((n_used, tokens, 1, 1), n_expert)
        memory = np.full(need + 256, 0x77, np.uint8)
        memory = memory[-memory.ctypes.data % 256 :]
        operand = Operand(ids.ctypes.data, (n_used, tokens, 1, 1), (4, 4 * n_used + 4, 0, 0), I32)
        node = gg.input("x", ne=(1,))
        call = Call(node, Operand(0, node.ne, node.nb, F32), {}, {})
        experts.launch_groups(call, operand, n_expert, memory.ctypes.data)
        launches = [record for record in call.records if isinstance(record, Launch)]
        starter(tmp_path, launches)(launches[0])

        def part(at: int, n: int, memory: np.ndarray = memory) -> np.ndarray:
            at -= memory.ctypes.data
            return memory[at : at + 4 * n].view(np.int32)

        order, places, table, count = experts._lists(memory.ctypes.data, pairs, tiles)
        flat = ids[:, :n_used].reshape(-1)
        flat = np.where((flat < 0) | (flat >= n_expert), n_expert, flat)
        sorted_pairs = np.argsort(flat, kind="stable")
        np.testing.assert_array_equal(part(order, pairs), sorted_pairs)
        where = np.argsort(sorted_pairs)
        where[flat == n_expert] = -1
        np.testing.assert_array_equal(part(places, pairs), where)
        counts = np.bincount(flat, minlength=n_expert + 1)
        starts = np.cumsum(counts) - counts
        pieces = [
            (e, starts[e] + i, min(width, counts[e] - i))
            for e in range(n_expert + 1)
            for i in range(0, counts[e], width)
        ]
        real = [piece for piece in pieces if piece[0] < n_expert]
        full = [piece for piece in real if piece[2] == width]
        rests = sorted((piece for piece in real if piece[2] < width), key=lambda p: -p[2])
        want = [*full, *rests, *(piece for piece in pieces if piece[0] == n_expert)]
        assert part(count, 2).tolist() == [len(want), len(real)]
        np.testing.assert_array_equal(part(table, 4 * len(want)).reshape(-1, 4)[:, :3], want)
