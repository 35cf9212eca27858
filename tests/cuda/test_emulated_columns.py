"""Products of many columns and experts of a prompt: kernels run on the host against the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda.gpu import H200
from pyggml.backends.cuda.linear import blocks, experts, ring
from pyggml.parity.tolerance import nmse
from tests.cuda.compared import Graph, compare, constant, random, rng
from tests.cuda.emulated import run

ONE = replace(H200, sms=1)


@pytest.mark.parametrize("dtype", ("iq4_nl", "q8_0", "mxfp4", "q6_K", "q5_K"))
def test_products_of_many_columns(dtype: str, tmp_path: Path) -> None:
    """Tiles that are not full, batches, f16 results, up and gate."""
    k, n = 256, 133
    w, heads = constant("w", dtype, 138, k), constant("heads", dtype, 2, 18, k)
    up, gate = constant("up", dtype, 70, k), constant("gate", dtype, 70, k)
    x, batch = gg.input("x", ne=(k, n)), gg.input("batch", ne=(k, n, 2))
    outputs = {
        "one": gg.mul_mat(w, x),
        "batches": gg.mul_mat(heads, batch),
        "gated": gg.fused_up_gate(up, gate, x),
    }
    inputs = {"x": random(n, k), "batch": random(2, n, k)}
    compare(outputs, inputs, tmp_path, 1e-4 if dtype == "mxfp4" else 1e-6, ONE)


@pytest.mark.parametrize(("dtype", "sms"), [("iq4_nl", 1), ("q6_K", 2)])
@pytest.mark.parametrize("arch", ("90a", "80"))
def test_two_products_in_one_launch(dtype: str, sms: int, arch: str, tmp_path: Path) -> None:
    """Of three products of the same columns the last two; tiles that are not full, rows that lie
    apart."""
    k, n = 256, 300
    x = gg.relu(gg.input("x", ne=(k, n)))
    outputs = {
        f"y{rows}": gg.mul_mat(constant(f"w{rows}", dtype, rows, k), x) for rows in (20, 150, 70)
    }
    steps = gg.compile(outputs, backends=["cuda:0:24GiB"]).steps
    together = (len(set(step.nodes) & set(outputs.values())) for step in steps)
    assert sorted(n for n in together if n) == [1, 2]
    compare(outputs, {"x": random(n, k)}, tmp_path, 1e-6, replace(H200, sms=sms, arch=arch))


@pytest.mark.parametrize(("rows", "sms"), [(8200, 75), (8215, 103)])
def test_teams_of_a_block(
    rows: int, sms: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven and five teams a block; the last block has a team without rows, the last tile a few."""
    monkeypatch.setattr(blocks, "LONG", 288)
    x = gg.input("x", ne=(288, 1))
    types = ("iq4_nl", "q4_0", "q5_1")  # of several types, so that they do not share a launch
    outputs = {t: gg.mul_mat(constant(t, t, rows, 288), x) for t in types}
    compare(outputs, {"x": random(1, 288)}, tmp_path, 1e-6, replace(H200, sms=sms))


def experts_of_many(
    dtype: str, tokens: int, n_expert: int, chosen: np.ndarray,
    n_ff: int = 36, n_embd: int = 138, k: int = 256, **act: Any,
) -> Graph:  # fmt: skip
    """Up and gate of one column a token, down of a column a pair and of one for two pairs."""
    n_used = chosen.shape[1]
    up, gate = (constant(name, dtype, n_expert, n_ff, k) for name in ("up", "gate"))
    down, odd = (constant(f"{n}", dtype, n_expert, n, k) for n in (n_embd, 37))
    x, ids = gg.input("x", ne=(k, 1, tokens)), gg.input("ids", "i32", ne=(n_used, tokens))
    wide, half = (gg.input(f"x{n}", ne=(k, n, tokens)) for n in (n_used, n_used // 2))
    outputs = {
        "hidden": gg.moe_up_gate(up, gate, x, ids, **act),
        "y": gg.mul_mat_id(down, wide, ids),
        "shared": gg.mul_mat_id(down, half, ids),
        "odd": gg.mul_mat_id(odd, wide, ids),
    }
    inputs = {node.attrs["name"]: random(*node.shape) for node in (x, wide, half)}
    for name in inputs:  # rows that no expert reads
        inputs[name][(chosen < 0).all(1)] = np.nan
    return outputs, {**inputs, "ids": chosen.astype(np.int32)}


def one_for_most(tokens: int, n_used: int) -> np.ndarray:
    """Expert 1 of 3 has all pairs but two, of expert 2."""
    chosen = np.ones((tokens, n_used), np.int32)
    chosen[tokens // 2, 1] = chosen[-1, 0] = 2
    return chosen


def with_gaps(tokens: int, n_used: int) -> np.ndarray:
    """Two experts. Some tokens have one of them twice, some have fewer, some have none."""
    chosen = rng.integers(-1, 2, (tokens, n_used))
    chosen[::7] = -1
    return chosen


def counted(*counts: int) -> np.ndarray:
    """So many pairs for each expert, in turn, of tokens with two."""
    return rng.permutation(np.repeat(np.arange(len(counts)), counts)).reshape(-1, 2)


@pytest.mark.parametrize(
    ("dtype", "n_expert", "chosen", "act", "sms"),
    [
        ("iq4_nl", 2, with_gaps(100, 4), {"limit": 0.5}, 3),
        ("q8_0", 2, with_gaps(190, 4), {}, 1),
        ("q6_K", 3, one_for_most(200, 2), {}, 1),
        ("q4_K", 4, counted(64, 65, 256, 257), {"act": "gelu"}, 1),
        ("mxfp4", 3, counted(0, 192, 224), {}, 2),
    ],
)
def test_experts_with_many_columns(
    dtype: str, n_expert: int, chosen: np.ndarray, act: dict, sms: int, tmp_path: Path
) -> None:
    """Lists of up to 256 columns: full, of one column, of none, for odd rows in two parts."""
    outputs, inputs = experts_of_many(dtype, len(chosen), n_expert, chosen, **act)
    compare(outputs, inputs, tmp_path, 1e-5, replace(H200, sms=sms))


@pytest.mark.parametrize(
    ("dtype", "chosen", "k", "act", "sms"),
    [
        ("iq4_nl", counted(0, 1, 32, 33, 64, 66), 320, {"limit": 0.5}, 1),
        ("q8_0", counted(0, 33, 32, 7), 1024, {}, 3),
        ("q6_K", with_gaps(40, 4), 512, {}, 1),
        ("q5_K", one_for_most(60, 2), 256, {"act": "gelu"}, 2),
        ("mxfp4", counted(40, 0, 60), 64, {}, 1),
    ],
)
def test_experts_with_few_columns(
    dtype: str, chosen: np.ndarray, k: int, act: dict, sms: int, tmp_path: Path
) -> None:
    """Lists of up to 32 or 64 columns; several tiles of rows; stages that end with 64 values of
    k."""
    n_expert = max(int(chosen.max()) + 1, 3)
    assert experts.columns_for(chosen.size, n_expert) <= ring.FEW
    outputs, inputs = experts_of_many(dtype, len(chosen), n_expert, chosen, 132, 300, k, **act)
    compare(outputs, inputs, tmp_path, 1e-5, replace(H200, sms=sms))


def sums_of_many(
    dtype: str,
    n_expert: int,
    chosen: np.ndarray,
    n_embd: int = 136,
    more: int = 2,
    n_ff: int | None = None,
) -> Graph:
    """down of a column a pair, the weighted sum, and up to two further terms. n_ff: down reads what
    up and gate compute."""
    tokens, n_used = chosen.shape
    down = constant("down", dtype, n_expert, n_embd, n_ff or 256)
    x = gg.input("x", ne=(256, 1 if n_ff else n_used, tokens))
    ids, b = gg.input("ids", "i32", ne=(n_used, tokens)), gg.relu(x)
    if n_ff:
        up, gate = (constant(name, dtype, n_expert, n_ff, 256) for name in ("up", "gate"))
        b = gg.moe_up_gate(up, gate, b, ids)
    shares = gg.input("shares", ne=(1, n_used, tokens))
    y = gg.mul_multi_add(gg.mul_mat_id(down, b, ids), shares)
    inputs = {"x": random(*x.shape), "shares": random(tokens, n_used, 1)}
    for i in range(more):
        y = gg.add(y, gg.input(f"more{i}", ne=(n_embd, tokens)))
        inputs[f"more{i}"] = random(tokens, n_embd)
    inputs["x"][(chosen < 0).all(1) if n_ff else chosen < 0] = np.nan  # no expert reads them
    return {"y": y}, {**inputs, "ids": chosen.astype(np.int32)}


def joined(graph: Graph) -> set[str]:
    """The products that share a step with their weighted sum."""
    steps = gg.compile(graph[0], backends=["cuda:0:24GiB"]).steps
    own = next({n.op.name for n in step.nodes} for step in steps if graph[0]["y"] in step.nodes)
    return own & {"moe_up_gate", "mul_mat_id"}


@pytest.mark.parametrize(
    ("dtype", "n_expert", "chosen", "more", "n_ff"),
    [
        ("iq4_nl", 2, with_gaps(100, 4), 2, None),
        ("q8_0", 1, with_gaps(20, 12).clip(max=0), 1, None),
        ("mxfp4", 3, counted(0, 192, 224), 0, None),
        ("iq4_nl", 6, counted(0, 1, 32, 33, 64, 66), 2, 192),
        ("q8_0", 2, with_gaps(70, 4), 1, 64),
    ],
)
@pytest.mark.parametrize("arch", ("90a", "80"))
def test_weighted_sums_of_many(
    dtype: str,
    n_expert: int,
    chosen: np.ndarray,
    more: int,
    n_ff: int | None,
    arch: str,
    tmp_path: Path,
) -> None:
    """What products hand on is f16 on 9.0. More pairs a token than are read at once, tokens without
    experts."""
    graph = sums_of_many(dtype, n_expert, chosen, more=more, n_ff=n_ff)
    assert len(joined(graph)) == (2 if n_ff else 1)
    limit = 1e-4 if dtype == "mxfp4" else 1e-6 if n_ff else 3e-7
    compare(*graph, tmp_path, limit, replace(H200, sms=2, arch=arch))


@pytest.mark.parametrize("shared", ("q8_0", None))
@pytest.mark.parametrize("arch", ("90a", "80"))
def test_experts_copy_rows_that_a_norm_left(shared: str | None, arch: str, tmp_path: Path) -> None:
    """If a product of all tokens reads them too; rows are no whole blocks of threads."""
    k, tokens, chosen = 4160, 70, with_gaps(70, 4)
    x, row = gg.input("x", ne=(k, tokens)), gg.constant(random(k), name="row")
    b = gg.mul(gg.rms_norm(x, eps=1e-6), row)
    ids, shares = gg.input("ids", "i32", ne=(4, tokens)), gg.input("shares", ne=(1, 4, tokens))
    up, gate = (constant(name, "iq4_nl", 2, 64, k) for name in ("up", "gate"))
    hidden = gg.moe_up_gate(up, gate, gg.reshape(b, ne=(k, 1, tokens)), ids)
    y = gg.mul_multi_add(gg.mul_mat_id(constant("down", "iq4_nl", 2, 72, 64), hidden, ids), shares)
    outputs = {"y": y}
    if shared:
        outputs["shared"] = gg.mul_mat(constant("shared", shared, 24, k), b)
    steps = gg.compile(outputs, backends=["cuda:0:24GiB"]).steps
    (step,) = (step for step in steps if hidden in step.nodes)
    assert ("rows" in step.operands) == bool(shared)
    inputs = {"x": random(tokens, k), "shares": random(tokens, 4, 1), "ids": chosen.astype("i4")}
    compare(outputs, inputs, tmp_path, 1e-6, replace(H200, sms=2, arch=arch))


def compare_tokens(
    graph: Graph, sizes: np.ndarray, special: int, limit: float, folder: Path
) -> None:
    """Each token by itself, relative to its size. Results of `special` tokens are not finite."""
    result = run(*graph, folder, replace(H200, sms=1))["y"]
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = gg.compile(graph[0], backends=["numpy"]).run(graph[1])["y"]
    finite = np.isfinite(wanted)
    assert (~finite).any(1).sum() == special and (finite == np.isfinite(result)).all()
    for token in np.flatnonzero(finite.all(1)):
        for first in range(3):
            got, want = (each[token, first::3] / sizes[token] for each in (result, wanted))
            assert nmse(got, want) <= limit, (token, first)


def with_large_rows(name: str, rows: int, k: int, large: float) -> gg.Node:
    """Of each three rows of weights, one is large and one is small."""
    weights = random(1, rows, k)
    weights[:, ::3] *= large
    weights[:, 1::3] *= 1e-3
    return gg.constant(weights, dtype="q8_0", name=name)


@pytest.mark.parametrize("gated", (False, True))
def test_results_that_f16_cannot_hold(gated: bool, tmp_path: Path) -> None:
    """Weights whose sums exceed what short rows expect, beside others in every row of results;
    columns of all sizes; infinity and NaN stay in their column."""
    n_embd, n_used, tokens, k = 72, 1 if gated else 2, 140, 64
    x, ids = gg.input("x", ne=(k, n_used, tokens)), gg.input("ids", "i32", ne=(n_used, tokens))
    most = 1e13 if gated else 1e30
    sizes = np.geomspace(1 / most, most, tokens, dtype=np.float32)
    values = random(tokens, n_used, k) * sizes[:, None, None]
    values[7, -1, 3], values[8, 0, 5], values[9, -1, 60] = np.nan, np.inf, -np.inf
    b, size = x, sizes
    if gated:
        # Large columns have gates of both signs, small ones results of second order.
        up, gate = (with_large_rows(name, 128, k, 50) for name in ("up", "gate"))
        b, size = gg.moe_up_gate(up, gate, x, ids), sizes**2
    down = with_large_rows("down", n_embd, b.ne[0], 2e3)
    shares = gg.input("shares", ne=(1, n_used, tokens))
    graph = {"y": gg.mul_multi_add(gg.mul_mat_id(down, b, ids), shares)}
    inputs = {"x": values, "shares": random(tokens, n_used, 1)}
    inputs["ids"] = np.zeros((tokens, n_used), np.int32)
    assert len(joined((graph, inputs))) == 1 + gated
    compare_tokens((graph, inputs), size, 3, 1e-5, tmp_path)
