"""The kernels that products record, in the scratch that they declare. Needs no GPU."""

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


def records_of(node: gg.Node, tiles: bool = True) -> list[Launch | Gemm]:
    """The records of a step; PyggmlError if it uses more scratch than it declares."""
    row = KERNELS[node.op]
    assert row.refuses(node) is None
    operands = {name: operand(node[name], i, tiles) for name, i in node.op.operands.items()}
    need = row.scratch(node) if row.scratch is not None else 0
    call = Call(node, operand(node, -1, False), operands, node.attrs, scratch=(BASE, need))
    row.run(call)
    return [r for r in call.records if isinstance(r, (Launch, Gemm))]


def kernels(records: Sequence[Launch | Gemm]) -> list[str]:
    return [r.name.split("<")[0] if isinstance(r, Launch) else "gemm" for r in records]


def mat(dtype: str, *ne: int, name: str = "a") -> gg.Node:
    return gg.input(f"{name}_{dtype}_{ne}", dtype, ne=ne)


@pytest.mark.parametrize("dtype", [*FORMATS, "f32", "f16", "bf16"])
@pytest.mark.parametrize("tiles", (True, False))
@pytest.mark.parametrize("n", (1, 2, 5, 8, 9, 40, 300))
@pytest.mark.parametrize("prec", ("default", "f32"))
def test_dense_products_keep_to_their_scratch(dtype: str, tiles: bool, n: int, prec: str) -> None:
    for a, b in (
        (mat(dtype, 512, 70), mat("f32", 512, n, name="b")),
        (mat(dtype, 256, 70, 2, 2), mat("f16", 256, n, 6, 4, name="b")),
    ):
        for type in ("f32", "f16"):
            records_of(gg.mul_mat(a, b, prec=prec, dtype=type), tiles)


@pytest.mark.parametrize(
    ("dtype", "n", "prec", "expected"),
    [
        ("iq4_nl", 8, "default", ["quantize", "vec"]),
        ("iq4_nl", 9, "default", ["to_halves", "tile"]),
        ("iq4_nl", 90, "f32", ["quantize", "vec"]),
        ("f16", 1, "default", ["vec_plain"]),
        ("f16", 2, "default", ["copy_rows", "gemm"]),
        ("f16", 2, "f32", ["vec_plain"]),
        ("f16", 100, "f32", ["exact", "add_splits"]),
        ("f32", 100, "default", ["exact", "add_splits"]),
    ],
)
def test_columns_choose_the_kernel(dtype: str, n: int, prec: str, expected: list[str]) -> None:
    node = gg.mul_mat(mat(dtype, 256, 64), mat("f32", 256, n, name="b"), prec=prec)
    assert kernels(records_of(node)) == expected


def test_many_rows_or_matrices_of_f32_go_to_cublas() -> None:
    for ne in ((256, 257), (256, 64, 2)):
        b = mat("f32", 256, 100, *ne[2:], name="b")
        assert kernels(records_of(gg.mul_mat(mat("f32", *ne), b))) == ["gemm"]


@pytest.mark.parametrize(
    ("dtype", "rows", "expected"),
    [
        ("iq3_xxs", 14336, ("vec_teams<iq3_xxs>", 128, 28)),
        ("q4_K", 10570, ("vec_teams<q4_K>", 111, 24)),
        ("q4_K", 8192, ("vec<q4_K, 1, 2, 1, 2, Groups>", 512, 8)),
        ("q4_K", 14848, ("vec<q4_K, 1, 2, 1, 2, Groups>", 928, 4)),
        ("q8_0", 14336, ("vec<q8_0, 1, 2, 1, 2, Groups>", 896, 4)),
        ("q6_K", 14336, ("vec<q6_K, 1, 2, 1, 2, Groups>", 896, 3)),
        ("q5_K", 15000, ("vec<q5_K, 1, 2, 1, 2, Groups>", 938, 3)),
        ("q5_K", 19000, ("vec<q5_K, 1, 2, 1, 2, Groups>", 1188, 4)),
    ],
)
def test_all_blocks_of_a_column_are_there_at_once(
    dtype: str, rows: int, expected: tuple[str, int, int]
) -> None:
    node = gg.mul_mat(mat(dtype, 4096, rows), mat("f32", 4096, 1, name="b"))
    _, product = records_of(node)
    assert isinstance(product, Launch)
    assert (product.name, product.grid[0], product.block[1]) == expected


def test_heads_are_one_batched_product() -> None:
    """Keys of 4 heads, 16 heads of queries: four products of 4 n columns."""
    keys, queries = mat("f16", 64, 1000, 4), mat("f16", 64, 20, 16, name="b")
    (product,) = records_of(gg.mul_mat(keys, queries))
    assert isinstance(product, Gemm)
    assert (product.m, product.n, product.k, product.batch) == (1000, 80, 64, 4)
    assert product.strides == (64_000, 5120, 80_000)


def test_large_b_is_converted_in_pieces() -> None:
    a, b = mat("f16", 16384, 128, 16), mat("f32", 16384, 2048, 16, name="b")
    node = gg.mul_mat(a, b)
    scratch = KERNELS[node.op].scratch
    assert scratch is not None and scratch(node) <= 3 * (64 << 20)
    assert kernels(records_of(node)).count("gemm") == 16


@pytest.mark.parametrize("dtype", [*FORMATS, "f32", "f16", "bf16"])
@pytest.mark.parametrize("tokens", (1, 11, 40, 700))
@pytest.mark.parametrize("tiles", (True, False))
@pytest.mark.parametrize("prec", ("default", "f32"))
def test_products_by_expert_keep_to_their_scratch(
    dtype: str, tokens: int, tiles: bool, prec: str
) -> None:
    rows = 76 if tokens == 700 else 75  # columns in the order of experts need even rows
    up, gate = mat(dtype, 256, rows, 9), mat(dtype, 256, rows, 9, name="gate")
    b, ids = mat("f32", 256, 2, tokens, name="b"), gg.input("ids", "i32", ne=(6, tokens))
    grouped = dtype != "f32" and 6 * tokens > routes.FEW_PAIRS and prec == "default"
    names = kernels(records_of(gg.mul_mat_id(up, b, ids, prec=prec), tiles))
    assert ("group_pairs" in names) == grouped
    records_of(gg.moe_up_gate(up, gate, b, ids, prec=prec), tiles)
    other = mat("q8_0", 256, rows, 9, name="other")
    records_of(gg.moe_up_gate(up, other, b, ids, prec=prec), tiles)


@pytest.mark.parametrize("dtype", [*FORMATS, "f32", "f16", "bf16"])
@pytest.mark.parametrize("n", (1, 6, 40))
def test_prec_f32_computes_in_f32_or_better(dtype: str, n: int) -> None:
    """24-bit activations for block types, f32 sums for plain ones; the kernel declares f32."""
    b, ids = mat("f32", 256, 2, n, name="b"), gg.input("ids", "i32", ne=(6, n))
    three, two = [mat(dtype, 256, 75, 9)] * 2, [mat(dtype, 256, 75)] * 2
    for node in (
        gg.mul_mat_id(three[0], b, ids, prec="f32"),
        gg.moe_up_gate(*three, b, ids, prec="f32"),
        gg.fused_up_gate(*two, b, prec="f32"),
    ):
        assert KERNELS[node.op].numeric(node) == "f32"
        records = records_of(node)
        names = [r.name for r in records if isinstance(r, Launch)]
        assert all(r.types[:2] == ("f32", "f32") for r in records if isinstance(r, Gemm))
        assert not {"tile", "group_pairs", "to_halves"} & set(kernels(records))
        for name in names:
            template, _, arguments = name.partition("<")
            if template in ("quantize", "vec", "vec_id"):
                level = {"quantize": 1, "vec": 2, "vec_id": 1}[template]
                assert arguments.rstrip(">").replace(" ", "").split(",")[level] == "3", name
    assert kernels(records_of(gg.mul_mat_id(three[0], b, ids, prec="f32"))) == (
        ["quantize", "vec_id"] if dtype in FORMATS else ["vec_plain_id"]
    )


def test_more_pairs_than_fit_a_grid_are_several_launches() -> None:
    """Each starts at the activations, ids and results of its own tokens."""
    n = 15_000
    b, ids = mat("f32", 256, 1, n, name="b"), gg.input("ids", "i32", ne=(6, n))
    node = gg.mul_mat_id(mat("q8_0", 256, 75, 9), b, ids, prec="f32")
    tokens, (quantized, first, second) = experts.GRID // 6, records_of(node)
    assert isinstance(quantized, Launch) and quantized.name == "quantize<float, 3>"
    assert isinstance(first, Launch) and isinstance(second, Launch)
    assert [first.grid[1], second.grid[1]] == [6 * tokens, 6 * (n - tokens)]
    groups = 256 // 32 * blocks.group_bytes(3)
    for launch, start in ((first, 0), (second, tokens)):
        words = struct.unpack_from(f"<{len(launch.args) // 8}Q", launch.args)
        x, y, ids_at = BASE + start * groups, BASE + start * 6 * 75 * 4, 4 * BASE + start * 6 * 4
        assert {x, y, ids_at} <= set(words)


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


@pytest.mark.parametrize("dtype", ("q4_K", "f16", "f32"))
@pytest.mark.parametrize("n", (1, 6, 40))
@pytest.mark.parametrize("prec", ("default", "f32"))
def test_fused_up_gate_keeps_to_its_scratch(dtype: str, n: int, prec: str) -> None:
    up, gate, b = mat(dtype, 256, 75), mat(dtype, 256, 75, name="gate"), mat("f32", 256, n, 2)
    names = kernels(records_of(gg.fused_up_gate(up, gate, b, prec=prec)))
    assert ("gate_rows" in names) == (dtype != "q4_K" or prec == "f32")


@pytest.mark.parametrize("dtype", ("f16", "f32"))
@pytest.mark.parametrize("prec", ("default", "f32"))
def test_two_products_by_cublas_share_their_scratch(dtype: str, prec: str) -> None:
    up, gate = mat(dtype, 2048, 1408), mat(dtype, 2048, 1408, name="gate")
    b = mat("f32", 2048, 20000, name="b")
    assert "gemm" in kernels(records_of(gg.fused_up_gate(up, gate, b, prec=prec)))


def fixed(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Activations as `quantize` rounds them: 16 bits with one scale for 32."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    step = np.abs(groups).max(axis=-1, keepdims=True) / (127 * 257)
    return np.asarray((np.rint(groups / step) * step).reshape(x.shape))


def test_the_error_of_fixed_point_is_relative_to_the_operands() -> None:
    """16 bits lose at most 2^-15 of the sum of magnitudes, but any share of a result that cancels:
    a sum of 64 products that is 1e-5 of their magnitudes may be 38 % off. See tolerance.CLASSES.
    """
    rng = np.random.default_rng(0)
    blocks = quants.encode_rows(TYPES["q4_0"], rng.standard_normal((1, 64)).astype("f4"))
    w = quants.decode_rows(TYPES["q4_0"], blocks)[0].astype(np.float64)
    x = rng.standard_normal((20000, 64))
    exact, result = x @ w, fixed(x) @ w
    assert (np.abs(result - exact) / (np.abs(x) @ np.abs(w))).max() < 2**-15
    assert tolerance.nmse(result, exact) < tolerance.CLASSES["f16"] / 100
    x -= np.outer(exact / (w @ w), w) * (1 - 1e-5)  # now every product cancels
    exact, result = x @ w, fixed(x) @ w
    assert (np.abs(result - exact) / (np.abs(x) @ np.abs(w))).max() < 2**-15
    assert (np.abs(result - exact) / np.abs(exact)).max() > 0.38


@pytest.mark.parametrize("n", (32_768, 32_769))
def test_ring_writes_results_of_at_most_16_gib(n: int) -> None:
    """It has their places in words, as numbers of 32 bits."""
    y = gg.mul_mat(mat("q8_0", 64, 131_072), mat("f32", 64, n, name="b"))
    assert kernels(records_of(y))[-1] == ("ring" if n == 32_768 else "tile")
