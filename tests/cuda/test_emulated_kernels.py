"""Kernels of decode steps and of a prompt's small steps, run on the host against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import quants
from pyggml.backends.cuda import norm
from pyggml.backends.cuda.attention import joint, scores
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.backends.cuda.linear import halves, plain
from pyggml.backends.cuda.weights.grids import LEVELS
from pyggml.dtypes import TYPES
from pyggml.parity import decode_patterns
from pyggml.parity.patterns import pattern
from pyggml.parity.tolerance import nmse
from tests.cuda.compared import Graph, compare, compare_all, constant, random, rng
from tests.cuda.emulated import Memory, run_all, starter

#: Patterns whose kernels the host can run.
ROUTING = (
    "experts", "grouped_experts", "root_routing", "given_routing", "divided_weights",
    "flat_weights", "norm_and_products", "norms_of_a_prompt", "keys_of_heads",
    "experts_of_devices", "experts_of_a_prompt", "feed_forward_of_a_prompt",
    "norms_behind_experts",
)  # fmt: skip
#: Of `scored_rows`, top_k is clusters of blocks, which test_top_k_host.py runs.
DECODE = (
    *(name for name in decode_patterns.PATTERNS if name != "scored_rows"),
    "latent_row_f16_normal", "latent_row_q8_0_neox",
)  # fmt: skip


@pytest.mark.parametrize("names", (ROUTING, DECODE), ids=("routing", "decode"))
def test_patterns(names: tuple[str, ...], tmp_path: Path) -> None:
    graphs = {name: pattern(name) for name in names}
    compare_all({name: (g.outputs, dict(g.inputs)) for name, g in graphs.items()}, tmp_path, 1e-6)


@pytest.mark.parametrize(("dtype", "n_tokens"), [("iq4_nl", 1), ("q5_0", 1), ("iq4_nl", 3)])
def test_experts_make_their_columns_fixed_point(dtype: str, n_tokens: int, tmp_path: Path) -> None:
    """down reads what up and gate wrote, two tiles of rows a block; 468 rows are 59 tiles."""
    n_expert, n_ff, n_embd = 9, 512, 468
    up, gate = (constant(name, dtype, n_expert, n_ff, 256) for name in ("up", "gate"))
    down = constant("down", dtype, n_expert, n_embd, n_ff)
    x, ids = gg.input("x", ne=(256, 1, n_tokens)), gg.input("ids", "i32", ne=(18, n_tokens))
    hidden = gg.moe_up_gate(up, gate, x, ids)
    y = gg.mul_mat_id(down, hidden, ids)
    inputs = {"x": random(n_tokens, 1, 256), "ids": rng.integers(-1, 10, (n_tokens, 18))}
    inputs["ids"] = np.minimum(inputs["ids"], 8).astype(np.int32)
    compare({"y": y}, inputs, tmp_path, 1e-6)


def test_streams_and_maps_that_nobody_reads(tmp_path: Path) -> None:
    """As after the last layer on a device that does not compute the logits."""
    graph = pattern("hyper_connections")
    outputs = {"x": graph.outputs["x"]}
    names = {node.attrs["name"] for node in gg.Graph(outputs).nodes if node.op.leaf}
    inputs = {name: values for name, values in graph.inputs.items() if name in names}
    compare(outputs, inputs, tmp_path, 1e-6)


def test_streams_of_many_experts_and_weights_that_begin_anywhere(tmp_path: Path) -> None:
    """More experts than a thread loads at once; weights of mixes that are not in 16-byte words."""
    n, hc, used = 100, 4, 11
    mixes = n * hc * (2 + hc) * hc

    def connected(streams: gg.Node, weights: gg.Node) -> tuple[gg.Node, gg.Node, gg.Node]:
        fn = gg.reshape(weights, ne=(n * hc, (2 + hc) * hc))
        flat = gg.rms_norm(gg.reshape(streams, ne=(n * hc, 1)), eps=1e-5)
        base, factor = gg.constant(random(24)), gg.constant(random(3))
        maps = gg.dsv4_hc_maps(gg.mul_mat(fn, flat, prec="f32"), factor, base, eps=0.0, n_iter=20)
        rows = (gg.view(maps, ne=(hc, 1, 1), start=(0, i)) for i in range(2))
        pre, post = (gg.permute(row, axes=(0, 2, 1, 3)) for row in rows)
        x = gg.mul(gg.rms_norm(gg.dsv4_hc_pre(streams, pre), eps=1e-6), norm)
        return x, post, gg.view(maps, ne=(hc, hc, 1), start=(0, 2))

    norm = gg.constant(random(n), name="norm")
    fn = gg.constant(random(mixes + 1), name="fn")
    streams = gg.input("streams", ne=(n, hc, 1))
    x, post, comb = connected(streams, gg.view(fn, ne=(mixes,)))
    experts, shares = gg.input("experts", ne=(n, used, 1)), gg.input("shares", ne=(1, used, 1))
    total = gg.add(gg.mul_multi_add(experts, shares), x)
    streams = gg.dsv4_hc_post(total, streams, post, comb)
    outputs = {"x": connected(streams, gg.view(fn, ne=(mixes,), start=(1,)))[0], "next": streams}
    inputs = {"streams": random(1, hc, n), "experts": random(1, used, n)}
    inputs["shares"] = random(1, used, 1)
    compare(outputs, inputs, tmp_path, 1e-6)


def test_a_block_walks_several_tiles_of_a_window_and_of_compressed_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block for each set of keys and 16 heads; the sets have scales and masks of their own, the
    first tile of compressed rows is whole, and rows that are not seen are NaN."""
    monkeypatch.setattr(joint, "FULL", 1)
    heads, rows, old = 16, 150, 200
    q, pos = gg.input("q", ne=(512, 1, heads)), gg.input("pos", "i32", ne=(1,))
    every = {n: gg.input(f"every{n}", "i32", ne=(n,)) for n in (rows, old)}

    def attention(n: int, mask: gg.Node, scale: float) -> gg.Node:
        new = gg.input(f"rows{n}", ne=(512, n))
        k = gg.set_rows(gg.state(f"cache{n}", "f16", ne=(512, n)), new, every[n])
        return gg.flash_attn_ext(q, k, k, mask, scale=scale, lse=True)

    window = gg.input("mask", "f16", ne=(rows, 1))
    first = attention(rows, window, 0.05)
    y = gg.merge_lse(first, attention(old, gg.causal_mask(pos, n_kv=old, stride=4), 0.02))
    y = gg.view(y, ne=(512, heads, 1))
    outputs = {"y": gg.scale(gg.rope_ext(y, pos, n_dims=64, offset=448, back=True), s=1.0)}
    seen = rng.random(rows) < 0.7
    inputs = {"q": random(heads, 1, 512), "pos": np.array([420], np.int32)}
    inputs["mask"] = np.where(seen, random(rows), -np.inf).astype(np.float16)[None]
    inputs |= {f"every{n}": np.arange(n, dtype=np.int32) for n in every}
    inputs |= {f"rows{n}": random(n, 512) for n in every}
    inputs[f"rows{rows}"][~seen] = np.nan
    inputs[f"rows{old}"][(420 + 1) // 4 :] = np.nan
    compare(outputs, inputs, tmp_path, 1e-6)


def test_a_device_reads_only_its_chosen_experts(tmp_path: Path) -> None:
    """The last three experts are chosen. All others are NaN, and so are all that a device has which
    has none of these: its sum is 0."""
    k, n, used, n_ff = 64, 8, 3, 32
    router = gg.constant(np.outer(np.arange(n), np.ones(k)) / k, name="router")
    inputs = {"x": np.abs(random(1, k))}

    def experts(own: tuple[int, ...]) -> gg.Node:
        def weight(name: str, *shape: int) -> gg.Node:
            rows = quants.encode_rows(TYPES["q8_0"], random(len(own), *shape))
            rows[[expert < n - used for expert in own], :, 1] = 0x7E  # of the first block's scale
            return gg.constant(rows, dtype="q8_0", name=name)

        x = gg.relu(gg.input("x", ne=(k, 1)))
        probs = gg.soft_max(gg.mul_mat(router, x))
        ids = gg.top_k(probs, k=used)
        shares = gg.get_rows(gg.reshape(probs, ne=(1, n, 1)), ids)
        ids = decode_patterns.ranks_of("own", ids, n, own)
        up, gate, down = weight("up", n_ff, k), weight("gate", n_ff, k), weight("down", k, n_ff)
        hidden = gg.moe_up_gate(up, gate, gg.reshape(x, ne=(k, 1, 1)), ids)
        return gg.mul_multi_add(gg.mul_mat_id(down, hidden, ids), shares)

    graphs = {str(own): ({"y": experts(own)}, inputs) for own in ((1, 6, 0, 5), (3, 0))}
    for graph, result in zip(graphs, run_all([*graphs.values()], tmp_path)):
        wanted = gg.compile(graphs[graph][0], backends=["numpy"]).run(inputs)["y"]
        assert np.isfinite(wanted).all() and wanted.any() == ("6" in graph)
        np.testing.assert_allclose(result["y"], wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(("k", "heads"), [(128, 4), (2816, 1)])
def test_a_product_makes_its_column_fixed_point(k: int, heads: int, tmp_path: Path) -> None:
    w, x = constant("w", "iq4_nl", heads, 20, k), gg.input("x", ne=(k, 1, heads))
    compare({"y": gg.mul_mat(w, x)}, {"x": random(heads, 1, k)}, tmp_path, 1e-8)


def in_grid(label: str, dtype: str, *shape: int) -> gg.Node:
    """A weight of random blocks whose scales are near 2^-6; no encoder has these types."""
    t = TYPES[dtype]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // t.block, t.nbytes), np.uint8)
    at = 55 if dtype == "iq1_m" else 1
    raw[..., at] = raw[..., at] & 0x83 | 0x24
    return gg.constant(raw.reshape(*shape[:-1], -1), dtype=dtype, name=label)


#: Ways to read codes, scales and high bits; groups of a row that leave lanes without one, several
#: rounds of a warp; rows that share the loads of the column, the last tile being odd.
ONE_COLUMN = (
    "iq4_nl", "nvfp4", "q8_0", "q2_K", "q3_K", "q4_K", "q6_K", "iq3_xxs", "iq2_xxs", "q1_0",
)  # fmt: skip


@pytest.mark.parametrize("dtype", ONE_COLUMN)
def test_products_of_one_column(dtype: str, tmp_path: Path) -> None:
    long, short = (-(-k // TYPES[dtype].block) * TYPES[dtype].block for k in (32 * 75, 160))
    many, w = constant("many", dtype, 8187, short), constant("w", dtype, 21, long)
    up, gate = constant("up", dtype, 13, long), constant("gate", dtype, 13, long)
    own, x = gg.input("own", ne=(short, 1)), gg.input("x", ne=(long, 1))
    outputs = {
        "many": gg.mul_mat(many, own), "w": gg.mul_mat(w, x),
        "up_gate": gg.fused_up_gate(up, gate, x),
    }  # fmt: skip
    inputs = {"own": random(1, short), "x": random(1, long)}
    compare(outputs, inputs, tmp_path, 1e-7)


@pytest.mark.parametrize("dtype", LEVELS)
def test_grid_types(dtype: str, tmp_path: Path) -> None:
    """A column and more, up and gate, experts, a product of 24-bit fixed point."""
    w = in_grid("w", dtype, 20, 512)
    up, gate = (in_grid(name, dtype, 4, 12, 256) for name in ("up", "gate"))
    one, three = gg.input("one", ne=(512,)), gg.input("three", ne=(512, 3))
    x, ids = gg.input("x", ne=(256, 1, 2)), gg.input("ids", "i32", ne=(3, 2))
    outputs = {
        "one": gg.mul_mat(w, one),
        "three": gg.mul_mat(w, three),
        "exact": gg.mul_mat(w, three, prec="f32"),
        "experts": gg.mul_mat_id(up, x, ids),
        "gated": gg.moe_up_gate(up, gate, x, ids),
    }
    inputs = {"one": random(512), "three": random(3, 512), "x": random(2, 1, 256)}
    inputs["ids"] = np.array([[3, 0, -1], [1, 3, 2]], np.int32)
    compare(outputs, inputs, tmp_path, 1e-8)


def experts_of_tokens(n: int, n_tokens: int, types: tuple[str, str, str], routing: str) -> Graph:
    """Routed and shared experts; without groups, each expert's score is that of a neighbor, too.

    routing: softmax; groups: of 32 experts, by the best one; sigmoid groups: and a bias, by the
    best two; softplus: its root, a bias, and weights that are divided by their sum
    """

    def weight(name: str, dtype: str, *shape: int) -> gg.Node:
        return (in_grid if dtype in LEVELS else constant)(name, dtype, *shape)

    k, used, rows, (gated, down, shared) = 512, 6, 84, types
    router = random(n, k)
    if "groups" not in routing:
        router[1::2] = router[::2]
    x = gg.relu(gg.input("x", ne=(k, n_tokens)))
    scores = gg.mul_mat(gg.constant(router, name="router"), x, prec="f32")
    bias = gg.constant(np.repeat(random(n // 2), 2) / 10, name="bias")
    if routing == "sigmoid groups":
        probs = gg.sigmoid(scores)
        ids = gg.grouped_topk(
            gg.add(probs, bias), n_group=n // 32, n_group_used=n // 64, n_top=2, k=used
        )
    elif routing == "softplus":
        probs = gg.sqrt(gg.softplus(scores))
        ids = gg.top_k(gg.add(probs, bias), k=used)
    else:
        probs = gg.soft_max(scores)
        ids = gg.top_k(probs, k=used)
        if routing == "groups":
            ids = gg.grouped_topk(probs, n_group=n // 32, n_group_used=n // 64, n_top=1, k=used)
    shares = gg.get_rows(gg.reshape(probs, ne=(1, n, n_tokens)), ids)
    if routing == "softplus":
        shares = gg.reshape(shares, ne=(used, n_tokens))
        total = gg.clamp(gg.sum_rows(shares), min=6e-5, max=float("inf"))
        shares = gg.reshape(gg.scale(gg.div(shares, total), s=1.5), ne=(1, used, n_tokens))
    up, gate = (weight(name, gated, n, 256, k) for name in ("up", "gate"))
    hidden = gg.moe_up_gate(up, gate, gg.reshape(x, ne=(k, 1, n_tokens)), ids)
    y = gg.mul_multi_add(gg.mul_mat_id(weight("down", down, n, rows, 256), hidden, ids), shares)
    up, gate = (weight(f"{name}_s", shared, 256, k) for name in ("up", "gate"))
    y = gg.add(y, gg.mul_mat(weight("down_s", "q8_0", rows, 256), gg.fused_up_gate(up, gate, x)))
    return {"y": y}, {"x": random(n_tokens, k)}


def test_experts_of_tokens(tmp_path: Path) -> None:
    """More experts than a warp reads at once, equal scores, types with grids."""
    graphs = {
        "groups": experts_of_tokens(256, 2, ("q4_K", "q6_K", "iq3_xxs"), "sigmoid groups"),
        "best_of_groups": experts_of_tokens(160, 2, ("q8_0", "q5_K", "q4_0"), "groups"),
        "ranked": experts_of_tokens(200, 2, ("q2_K", "q2_K", "q8_0"), "softplus"),
        "many": experts_of_tokens(258, 1, ("q2_K", "q3_K", "q2_K"), "softplus"),
        "equal": experts_of_tokens(64, 3, ("iq4_nl", "iq4_nl", "q8_0"), "softmax"),
        "grids": experts_of_tokens(16, 1, ("iq2_xs", "iq3_xxs", "q8_0"), "softmax"),
    }
    for outputs, _ in graphs.values():
        steps = gg.compile(outputs, backends=["cuda:0:24GiB"]).steps
        assert any(outputs["y"] in step.nodes and len(step.nodes) >= 10 for step in steps)
    compare_all(graphs, tmp_path, 1e-8)


@pytest.mark.parametrize("routing", ("softmax", "softplus"))
def test_experts_of_a_token_that_is_not_a_number(routing: str, tmp_path: Path) -> None:
    """Its whole row is NaN, and the others are as without it."""
    outputs, inputs = experts_of_tokens(64, 3, ("iq4_nl", "q2_K", "q8_0"), routing)
    (whole,) = run_all([(outputs, inputs)], tmp_path)
    x = inputs["x"].copy()
    x[1, 7] = np.nan
    (result,) = run_all([(outputs, {"x": x})], tmp_path)
    assert np.isnan(result["y"][1]).all()
    np.testing.assert_array_equal(result["y"][[0, 2]], whole["y"][[0, 2]])


ORDER = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]


@pytest.mark.parametrize("k", (96, 2080))
@pytest.mark.parametrize("dtype", (np.float32, np.float16))
@pytest.mark.parametrize("apart", (False, True))
def test_rows_for_the_tensor_cores(k: int, dtype: Any, apart: bool, tmp_path: Path) -> None:
    """Scaled by a power of two, in the order of a thread's weights, padded with zeros."""
    x = (random(3, k) * np.float32([[1e-3], [1], [3e4 / 5]])).astype(dtype)
    x[0] *= dtype(1e-4)
    x[1, 7] = np.inf
    wide = np.zeros((3, 2 * k if apart else k), dtype)
    b = wide[:, ::2] if apart else wide
    b[:] = x
    size, columns = np.dtype(dtype).itemsize, 3
    step = 2 * size if apart else size
    memory = Memory(1 << 16)
    operand = Operand(
        wide.ctypes.data, (k, columns, 1, 1), (step, wide.strides[0], 0, 0),
        TYPES["f32" if dtype is np.float32 else "f16"],
    )  # fmt: skip
    node = gg.input("b", ne=(k, columns))
    call = Call(node, operand, {}, {}, scratch=(memory.ptr, memory.data.size))
    out, scales = halves.to_halves(call, operand, "__half")
    for record in call.records:
        assert isinstance(record, Launch)
        starter(tmp_path, [record])(record)
    padded = halves.padded(k)
    rows = np.frombuffer(memory.data, np.float16, columns * padded, int(out) - memory.ptr)
    rows = rows.reshape(columns, padded // 16, 16)
    back = np.empty_like(rows, np.float32)
    back[..., ORDER] = rows
    scale = np.frombuffer(memory.data, np.float32, columns, int(scales) - memory.ptr)
    top = np.abs(np.where(np.isfinite(rows), rows, 0)).max((1, 2))
    assert ((top >= 2**14) & (top <= 2**15)).all()
    result = back.reshape(columns, padded) * scale[:, None]
    np.testing.assert_allclose(result[:, :k], x.astype(np.float32), rtol=1e-3, atol=2e-8)
    assert not result[:, k:].any()


@pytest.mark.parametrize("k", (64, 4160, 8256))
def test_a_norm_writes_the_halves_of_its_row(k: int, tmp_path: Path) -> None:
    """The same bits as `to_halves` of the result: rows of zeros, of few numbers, with infinity."""
    x, weight = random(5, k), random(k)
    x[1], x[2, 3:], x[3, 7] = 0, 0, np.inf
    weight[k // 2] = np.inf
    y, total = np.zeros((2, 5, k), np.float32)
    memory = [Memory(1 << 18) for _ in range(2)]
    row = 4 * k

    def operand(array: np.ndarray, rows: int = 5) -> Operand:
        return Operand(array.ctypes.data, (k, rows, 1, 1), (4, row, 0, 0), TYPES["f32"])

    def halves_at(i: int) -> Operand:
        return Operand(memory[i].ptr, (1, 1, 1, 1), (1, 1, 1, 1), TYPES["i8"])

    operands = {"a": operand(x), "plus": operand(x), "weight": operand(weight, 1)}
    operands |= {"sum": operand(total), "halves": halves_at(0)}
    call = Call(gg.input("b", ne=(k, 5)), operand(y), operands, {})
    norm._norm(call, 1e-6)
    assert len(call.records) == 1
    halves.launch_halves(call, operand(y), memory[1].ptr, "__half")
    start = starter(tmp_path, call.records)
    for record in call.records:
        start(record)
    size = halves.tile_scratch((k, 5, 1, 1))
    own, other = (each.data[:size] for each in memory)
    np.testing.assert_array_equal(own, other)
    np.testing.assert_array_equal(total, x + x)
    ends = own[-256:].view(np.float32)[:5]
    assert np.isfinite(ends).all() and own.view(np.float16)[: 5 * k].any()


@pytest.mark.parametrize(("k", "m"), [(64, 24), (7, 5)])
def test_copies_of_rows(k: int, m: int, tmp_path: Path) -> None:
    """From any rows to contiguous ones of another type, and from these to any rows."""
    source, out, target = random(4, 2 * k), Memory(1 << 12), np.zeros((4, 3 * m), np.float16)
    types = TYPES
    rows = Operand(source.ctypes.data, (k, 4, 1, 1), (4, 8 * k, 0, 0), types["f32"])
    y = Operand(target.ctypes.data, (m, 4, 1, 1), (2, 6 * m, 0, 0), types["f16"])
    product = random(2, m)
    call = Call(gg.input("b", ne=(k, 4)), rows, {}, {})
    plain.copy_rows(call, rows, types["f16"], out.ptr, 1, 3)
    plain.put_rows(call, product.ctypes.data, y, 2, 2)
    start = starter(tmp_path, [r for r in call.records if isinstance(r, Launch)])
    for record in call.records:
        start(record)
    copies = np.frombuffer(out.data, np.float16, 3 * k).reshape(3, k)
    np.testing.assert_array_equal(copies, source[1:, :k].astype(np.float16))
    np.testing.assert_array_equal(target[2:, :m], product.astype(np.float16))
    assert not target[:2].any() and not target[:, m:].any()


@pytest.mark.parametrize(("n", "n_ids"), [(1, 700), (3, 5)])
def test_rows_of_ids(n: int, n_ids: int, tmp_path: Path) -> None:
    """A thread has an element; an id that is none, or past the end, gives zeros."""
    table, ids = gg.input("table", "i32", ne=(n, 9)), gg.input("ids", "i32", ne=(n_ids,))
    inputs = {
        "table": rng.integers(-5, 99, (9, n)).astype(np.int32),
        "ids": rng.integers(-1, 9, n_ids).astype(np.int32),
    }
    compare({"y": gg.get_rows(table, ids)}, inputs, tmp_path, 0.0)


# -- attention without flash attention ---------------------------------------------------------


def attention(
    n_kv: int = 160, n_q: int = 40, heads: int = 4, heads_kv: int = 4, streams: int = 1,
    mask: str = "causal", window: int | None = None, sinks: bool = False,
) -> Graph:  # fmt: skip
    """Softmax attention of the last queries, 24/16. Keys that are hidden from all are NaN."""

    def leaf(name: str, dtype: str, *ne: int) -> gg.Node:
        inputs[name] = random(*ne[::-1]).astype(np.float16 if dtype == "f16" else np.float32)
        return gg.input(name, dtype, ne=ne)

    inputs: dict[str, Any] = {}
    k, v = (leaf(x, "f16", d, n_kv, heads_kv, streams) for x, d in (("k", 24), ("v", 16)))
    q = gg.permute(leaf("q", "f32", 24, heads, n_q, streams), axes=(0, 2, 1, 3))
    if mask == "causal":
        inputs["pos"] = np.arange(n_kv - n_q - 9, n_kv - 9, dtype=np.int32)
        inputs["pos"][0] = -1
        inputs["k"][..., n_kv - 9 :, :] = np.nan
        hidden = gg.causal_mask(gg.input("pos", "i32", ne=(n_q,)), n_kv=n_kv, window=window)
    else:
        hidden = leaf("mask", mask, n_kv, n_q, heads, streams)
        inputs["mask"][..., ::3] = -np.inf
    sink = leaf("sinks", "f32", heads) if sinks else None
    p = gg.soft_max_ext(gg.mul_mat(k, q), hidden, sink, scale=0.3)
    return {"y": gg.mul_mat(gg.transpose(v), p)}, inputs


ATTENTIONS = {
    "heads": attention(),
    "rows": attention(n_kv=256, n_q=80),
    "splits": attention(n_kv=1024, n_q=24, heads=2, heads_kv=2),
    "grouped": attention(heads=6, heads_kv=2),
    "one_matrix": attention(heads=4, heads_kv=1),
    "streams": attention(n_kv=96, n_q=12, heads=2, heads_kv=1, streams=3, mask="f16"),
    "window": attention(window=31, sinks=True),
    "mask": attention(n_q=9, mask="f32", sinks=True),
    "odd": attention(n_kv=79, n_q=30),
    "rounds": attention(n_kv=33_000, n_q=10, heads=1, heads_kv=1),
}


@pytest.mark.parametrize(
    ("piece", "amb"), [(scores.PIECE, None), (1 << 14, None), (1 << 12, 0.0085)]
)
def test_attention_in_pieces(
    piece: int, amb: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The softmax overwrites scores with narrower numbers. Masks come from positions, unless the
    attention is cut into a loop: then its pieces are cut further."""
    monkeypatch.setattr(scores, "PIECE", piece)
    seen = {name: (y, {**x, "k": np.nan_to_num(x["k"])}) for name, (y, x) in ATTENTIONS.items()}
    graphs = ATTENTIONS if amb is None else seen  # a mask is added: NaN stays
    names = [name for name in ATTENTIONS if amb is None or name != "rounds"]
    for name, results in zip(names, run_all([graphs[name] for name in names], tmp_path, amb=amb)):
        outputs, inputs = seen[name]
        expected = gg.compile(outputs, backends=["numpy"]).run(inputs)["y"]
        assert nmse(results["y"], expected) <= 1e-6, name


#: A GPU on which a block takes many tiles, one after another.
