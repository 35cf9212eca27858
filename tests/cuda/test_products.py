"""What products record: which kernels, in the scratch that they declared. No GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import pyggml as gg
from pyggml.backends.cuda import experts, linear, packing  # noqa: F401 (they fill the table)
from pyggml.backends.cuda.launch import Call, Gemm, Launch, Operand
from pyggml.backends.cuda.table import KERNELS

BASE = 1 << 40


def operand(node: gg.Node, index: int, tiles: bool) -> Operand:
    layout = "tiles8" if tiles and node.dtype.name in packing.FORMATS else "plain"
    return Operand(BASE * (index + 2), node.ne, node.nb, node.dtype, layout)


def recorded(node: gg.Node, tiles: bool = True) -> list[Launch | Gemm]:
    """The step's records; PyggmlError where it takes more scratch than it declared."""
    row = KERNELS[node.op]
    assert row.refuses(node) is None
    src = [operand(s, i, tiles) for i, s in enumerate(node.src) if s is not None]
    need = row.scratch(node) if row.scratch is not None else 0
    call = Call(node, operand(node, -1, False), src, node.attrs, scratch=(BASE, need))
    row.record(call)
    return [r for r in call.records if isinstance(r, (Launch, Gemm))]


def kernels(records: Sequence[Launch | Gemm]) -> list[str]:
    return [r.name.split("<")[0] if isinstance(r, Launch) else "gemm" for r in records]


def mat(kind: str, *ne: int, name: str = "a") -> gg.Node:
    return gg.input(f"{name}_{kind}_{ne}", kind, ne=ne)


@pytest.mark.parametrize("kind", [*packing.FORMATS, "f32", "f16", "bf16"])
@pytest.mark.parametrize("tiles", (True, False))
@pytest.mark.parametrize("n", (1, 2, 5, 8, 9, 40, 300))
@pytest.mark.parametrize("prec", ("default", "f32"))
def test_dense_products_keep_to_their_scratch(kind: str, tiles: bool, n: int, prec: str) -> None:
    for a, b in (
        (mat(kind, 512, 70), mat("f32", 512, n, name="b")),
        (mat(kind, 256, 70, 2, 2), mat("f16", 256, n, 6, 4, name="b")),
    ):
        for type in ("f32", "f16"):
            recorded(gg.mul_mat(a, b, prec=prec, type=type), tiles)


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


@pytest.mark.parametrize("kind", [*packing.FORMATS, "f32", "f16", "bf16"])
@pytest.mark.parametrize("tokens", (1, 11, 40, 700))
@pytest.mark.parametrize("tiles", (True, False))
def test_products_by_expert_keep_to_their_scratch(kind: str, tokens: int, tiles: bool) -> None:
    up, gate = mat(kind, 256, 75, 9), mat(kind, 256, 75, 9, name="gate")
    b, ids = mat("f32", 256, 2, tokens, name="b"), gg.input("ids", "i32", ne=(6, tokens))
    grouped = kind != "f32" and 6 * tokens > experts.FEW
    one = kernels(recorded(gg.mul_mat_id(up, b, ids), tiles))
    assert ("group_pairs" in one) == grouped
    recorded(gg.moe_up_gate(up, gate, b, ids), tiles)
    recorded(gg.moe_up_gate(up, mat("q8_0", 256, 75, 9, name="other"), b, ids), tiles)


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
def test_fused_up_gate_keeps_to_its_scratch(kind: str, n: int) -> None:
    up, gate = mat(kind, 256, 75), mat(kind, 256, 75, name="gate")
    names = kernels(recorded(gg.fused_up_gate(up, gate, mat("f32", 256, n, 2, name="b"))))
    assert ("gate_rows" in names) == (kind != "q4_K")


def test_block_types_without_a_decoder_are_refused_in_the_graph() -> None:
    node = gg.mul_mat(mat("iq2_xs", 256, 64), mat("f32", 256, 2, name="b"))
    assert "iq2_xs" in (KERNELS[node.op].refuses(node) or "")
