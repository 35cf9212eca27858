"""What products record: which kernels, in the scratch that they declared. No GPU."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml import quants
from pyggml.backends.cuda.launch import Call, Gemm, Launch, Operand
from pyggml.backends.cuda.linear import blocks, experts, routes
from pyggml.backends.cuda.table import KERNELS
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.dtypes import TYPES
from pyggml.parity import tolerance

BASE = 1 << 40


def operand(node: gg.Node, index: int, tiles: bool) -> Operand:
    layout = "tiles8" if tiles and node.dtype.name in FORMATS else "plain"
    return Operand(BASE * (index + 2), node.ne, node.nb, node.dtype, layout)


def recorded(node: gg.Node, tiles: bool = True) -> list[Launch | Gemm]:
    """The step's records; PyggmlError where it takes more scratch than it declared."""
    row = KERNELS[node.op]
    assert row.refuses(node) is None
    operands = {name: operand(node[name], i, tiles) for name, i in node.op.operands.items()}
    need = row.scratch(node) if row.scratch is not None else 0
    call = Call(node, operand(node, -1, False), operands, node.attrs, scratch=(BASE, need))
    row.run(call)
    return [r for r in call.records if isinstance(r, (Launch, Gemm))]


def kernels(records: Sequence[Launch | Gemm]) -> list[str]:
    return [r.name.split("<")[0] if isinstance(r, Launch) else "gemm" for r in records]


def mat(kind: str, *ne: int, name: str = "a") -> gg.Node:
    return gg.input(f"{name}_{kind}_{ne}", kind, ne=ne)


@pytest.mark.parametrize("kind", [*FORMATS, "f32", "f16", "bf16"])
@pytest.mark.parametrize("tiles", (True, False))
@pytest.mark.parametrize("n", (1, 2, 5, 8, 9, 40, 300))
@pytest.mark.parametrize("prec", ("default", "f32"))
def test_dense_products_keep_to_their_scratch(kind: str, tiles: bool, n: int, prec: str) -> None:
    for a, b in (
        (mat(kind, 512, 70), mat("f32", 512, n, name="b")),
        (mat(kind, 256, 70, 2, 2), mat("f16", 256, n, 6, 4, name="b")),
    ):
        for type in ("f32", "f16"):
            recorded(gg.mul_mat(a, b, prec=prec, dtype=type), tiles)


@pytest.mark.parametrize(
    ("kind", "n", "prec", "want"),
    [
        ("iq4_nl", 8, "default", ["quantize", "vec"]),
        ("iq4_nl", 9, "default", ["to_halves", "tile"]),
        ("iq4_nl", 90, "f32", ["quantize", "vec"]),
        ("f16", 1, "default", ["vec_plain"]),
        ("f16", 2, "default", ["copy_rows", "gemm"]),
        ("f16", 2, "f32", ["vec_plain"]),
        ("f32", 100, "default", ["gemm"]),
    ],
)
def test_columns_choose_the_kernel(kind: str, n: int, prec: str, want: list[str]) -> None:
    node = gg.mul_mat(mat(kind, 256, 64), mat("f32", 256, n, name="b"), prec=prec)
    assert kernels(recorded(node)) == want


def test_heads_are_one_batched_product() -> None:
    """Keys of 4 heads, 16 heads of queries: four products of 4 n columns."""
    keys, queries = mat("f16", 64, 1000, 4), mat("f16", 64, 20, 16, name="b")
    (product,) = recorded(gg.mul_mat(keys, queries))
    assert isinstance(product, Gemm)
    assert (product.m, product.n, product.k, product.batch) == (1000, 80, 64, 4)
    assert product.strides == (64_000, 5120, 80_000)


def test_large_b_is_converted_in_pieces() -> None:
    a, b = mat("f16", 16384, 128, 16), mat("f32", 16384, 2048, 16, name="b")
    node = gg.mul_mat(a, b)
    scratch = KERNELS[node.op].scratch
    assert scratch is not None and scratch(node) <= 3 * (64 << 20)
    assert kernels(recorded(node)).count("gemm") == 16


@pytest.mark.parametrize("kind", [*FORMATS, "f32", "f16", "bf16"])
@pytest.mark.parametrize("tokens", (1, 11, 40, 700))
@pytest.mark.parametrize("tiles", (True, False))
@pytest.mark.parametrize("prec", ("default", "f32"))
def test_products_by_expert_keep_to_their_scratch(
    kind: str, tokens: int, tiles: bool, prec: str
) -> None:
    up, gate = mat(kind, 256, 75, 9), mat(kind, 256, 75, 9, name="gate")
    b, ids = mat("f32", 256, 2, tokens, name="b"), gg.input("ids", "i32", ne=(6, tokens))
    grouped = kind != "f32" and 6 * tokens > routes.FEW_PAIRS and prec == "default"
    one = kernels(recorded(gg.mul_mat_id(up, b, ids, prec=prec), tiles))
    assert ("group_pairs" in one) == grouped
    recorded(gg.moe_up_gate(up, gate, b, ids, prec=prec), tiles)
    other = mat("q8_0", 256, 75, 9, name="other")
    recorded(gg.moe_up_gate(up, other, b, ids, prec=prec), tiles)


@pytest.mark.parametrize("kind", [*FORMATS, "f32", "f16", "bf16"])
@pytest.mark.parametrize("n", (1, 6, 40))
def test_nothing_less_than_f32_where_it_is_asked(kind: str, n: int) -> None:
    """24-bit activations for block types, f32 sums for plain ones, declared as such."""
    b, ids = mat("f32", 256, 2, n, name="b"), gg.input("ids", "i32", ne=(6, n))
    three, two = [mat(kind, 256, 75, 9)] * 2, [mat(kind, 256, 75)] * 2
    for node in (
        gg.mul_mat_id(three[0], b, ids, prec="f32"),
        gg.moe_up_gate(*three, b, ids, prec="f32"),
        gg.fused_up_gate(*two, b, prec="f32"),
    ):
        assert KERNELS[node.op].numeric(node) == "f32"
        records = recorded(node)
        names = [r.name for r in records if isinstance(r, Launch)]
        assert all(r.types[:2] == ("f32", "f32") for r in records if isinstance(r, Gemm))
        assert not {"tile", "group_pairs", "to_halves"} & set(kernels(records))
        for name in names:
            head, _, rest = name.partition("<")
            if head in ("quantize", "vec", "vec_id"):
                level = {"quantize": 1, "vec": 2, "vec_id": 1}[head]
                assert rest.rstrip(">").replace(" ", "").split(",")[level] == "3", name
    assert kernels(recorded(gg.mul_mat_id(three[0], b, ids, prec="f32"))) == (
        ["quantize", "vec_id"] if kind in FORMATS else ["vec_plain_id"]
    )


def test_more_pairs_than_a_grid_has_are_several_launches() -> None:
    """Each begins at its own tokens' activations, ids and results."""
    n = 15_000
    b, ids = mat("f32", 256, 1, n, name="b"), gg.input("ids", "i32", ne=(6, n))
    node = gg.mul_mat_id(mat("q8_0", 256, 75, 9), b, ids, prec="f32")
    tokens, (quantized, first, second) = experts.GRID // 6, recorded(node)
    assert isinstance(quantized, Launch) and quantized.name == "quantize<float, 3>"
    assert isinstance(first, Launch) and isinstance(second, Launch)
    assert [first.grid[1], second.grid[1]] == [6 * tokens, 6 * (n - tokens)]
    groups = 256 // 32 * blocks.group_bytes(3)
    for launch, start in ((first, 0), (second, tokens)):
        words = struct.unpack_from(f"<{len(launch.args) // 8}Q", launch.args)
        x, y, chosen = BASE + start * groups, BASE + start * 6 * 75 * 4, 4 * BASE + start * 6 * 4
        assert {x, y, chosen} <= set(words)


@pytest.mark.parametrize("pairs", (1, 100, 6000))
@pytest.mark.parametrize("n_experts", (1, 8, 64))
def test_tiles_suffice_for_any_choice(pairs: int, n_experts: int) -> None:
    """The worst choice leaves every expert one pair past a whole tile."""
    columns = experts.columns_for(pairs, n_experts)
    few = min(n_experts, pairs)
    worst = max(
        sum(-(-c // columns) for c in (1,) * (few - 1) + (pairs - few + 1,)),
        few + (pairs - few) // columns,
    )
    assert worst <= experts.most_tiles(pairs, n_experts, columns)


@pytest.mark.parametrize("kind", ("q4_K", "f16", "f32"))
@pytest.mark.parametrize("n", (1, 6, 40))
@pytest.mark.parametrize("prec", ("default", "f32"))
def test_fused_up_gate_keeps_to_its_scratch(kind: str, n: int, prec: str) -> None:
    up, gate, b = mat(kind, 256, 75), mat(kind, 256, 75, name="gate"), mat("f32", 256, n, 2)
    names = kernels(recorded(gg.fused_up_gate(up, gate, b, prec=prec)))
    assert ("gate_rows" in names) == (kind != "q4_K" or prec == "f32")


@pytest.mark.parametrize("kind", ("f16", "f32"))
@pytest.mark.parametrize("prec", ("default", "f32"))
def test_two_products_by_cublas_share_the_scratch_they_declared(kind: str, prec: str) -> None:
    up, gate = mat(kind, 2048, 1408), mat(kind, 2048, 1408, name="gate")
    b = mat("f32", 2048, 20000, name="b")
    assert "gemm" in kernels(recorded(gg.fused_up_gate(up, gate, b, prec=prec)))


def fixed(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Activations as `quantize` brings them into 16 bits, by groups of 32."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    step = np.abs(groups).max(axis=-1, keepdims=True) / (127 * 257)
    return np.asarray((np.rint(groups / step) * step).reshape(x.shape))


def test_what_fixed_point_loses_is_a_part_of_the_operands() -> None:
    """16 bits lose 2^-15 of the sum of magnitudes at most, but any part of a result that cancels:
    one of 64 products that is 1e-5 of their magnitudes may be 38 % off. tolerance.CLASSES says so.
    """
    rng = np.random.default_rng(0)
    blocks = quants.encode_rows(TYPES["q4_0"], rng.standard_normal((1, 64)).astype("f4"))
    w = quants.decode_rows(TYPES["q4_0"], blocks)[0].astype(np.float64)
    x = rng.standard_normal((20000, 64))
    exact, got = x @ w, fixed(x) @ w
    assert (np.abs(got - exact) / (np.abs(x) @ np.abs(w))).max() < 2**-15
    assert tolerance.nmse(got, exact) < tolerance.CLASSES["f16"] / 100
    x -= np.outer(exact / (w @ w), w) * (1 - 1e-5)  # now every product cancels
    exact, got = x @ w, fixed(x) @ w
    assert (np.abs(got - exact) / (np.abs(x) @ np.abs(w))).max() < 2**-15
    assert (np.abs(got - exact) / np.abs(exact)).max() > 0.38
