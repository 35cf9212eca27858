"""Kernels load several numbers at once if sizes, strides and addresses allow it."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest

import pyggml as gg
from pyggml.backends.cuda.attention.routes import Shape
from pyggml.backends.cuda.device.tensormap import steps_of
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.backends.cuda.table import KERNELS
from pyggml.node import Node

BASE = 1 << 40


def launches_of(node: Node, shift: int = 0) -> list[Launch]:
    """The launches of a node whose operands all start `shift` bytes past a multiple of 256."""
    row = KERNELS[node.op]
    need = row.scratch(node) if row.scratch is not None else 0
    operands = {
        name: Operand(BASE * (i + 3) + shift, n.ne, n.nb, n.dtype)
        for name, i in node.op.operands.items()
        if (n := node.get(name)) is not None
    }
    out = Operand(BASE * 2 + shift, node.ne, node.nb, node.dtype)
    call = Call(node, out, operands, node.attrs, scratch=(BASE, need))
    row.run(call)
    return [record for record in call.records if isinstance(record, Launch)]


def packs(launch: Launch) -> list[int]:
    """The numbers among a kernel's template arguments."""
    return [int(n) for n in re.findall(r"\b\d+\b", launch.name.partition("<")[2])]


X = gg.input("x", ne=(64, 6))
ROW = gg.input("row", ne=(64,))
HALVES = gg.input("halves", "f16", ne=(64, 6))


@pytest.mark.parametrize(
    ("make", "wide"),
    [
        (lambda x: gg.silu(x), 4),
        (lambda x: gg.add(x, x), 4),
        (lambda x: gg.add(x, ROW), 4),
        (lambda x: gg.rms_norm(x, eps=1e-6), 4),
        (lambda x: gg.norm(x, eps=1e-6), 4),
        (lambda x: gg.soft_max(x), 4),
        (lambda x: gg.cast(x, dtype="f16"), 4),
    ],
)
def test_packs_need_aligned_rows(make: Any, wide: int) -> None:
    (aligned,) = launches_of(make(X))
    assert wide in packs(aligned), aligned.name
    unaligned = (
        launches_of(make(X), 4),
        launches_of(make(gg.view(gg.input("long", ne=(65, 6)), ne=(64, 6)))),
        launches_of(make(gg.view(gg.input("apart", ne=(128, 6)), ne=(64, 6), step=(2, 1)))),
    )
    for (launch,) in unaligned:
        assert wide not in packs(launch), launch.name


@pytest.mark.parametrize("shift", (0, 2, 4, 8))
@pytest.mark.parametrize("type", ("f32", "f16"))
def test_products_need_aligned_rows(type: str, shift: int) -> None:
    a = gg.input("a", type, ne=(64, 6))
    (launch,) = launches_of(gg.mul_mat(a, gg.input("b", ne=(64, 1))), shift)
    assert ("true" in launch.name) == (shift == 0), launch.name


@pytest.mark.parametrize("type", ("f32", "f16", "bf16"))
@pytest.mark.parametrize("d_v", (1, 4, 5, 32, 33))
@pytest.mark.parametrize("n_q", (1, 3))
@pytest.mark.parametrize("heads", (1, 3))
def test_results_of_split_keys_are_aligned(type: str, d_v: int, n_q: int, heads: int) -> None:
    """Sums that are read in fours start at a multiple of 16, (max, sum) pairs at one of 8."""
    q = gg.input("q", ne=(32, n_q, heads))
    k, v = gg.input("k", type, ne=(32, 300, 1)), gg.input("v", type, ne=(d_v, 300, 1))
    node = gg.flash_attn_ext(q, k, v, scale=0.2)
    *_, launch = launches_of(node)
    assert launch.name == f"combine<{4 if d_v % 4 == 0 else 1}>"
    sums, stats = struct.unpack_from("<2Q", launch.args, 8 * 8)
    n_sums, n_stats = Shape.of(node).parts("any")
    assert sums % 16 == 0 and stats % 8 == 0
    assert stats >= sums + n_sums and n_sums >= 4 * d_v * (n_stats // 8)


@pytest.mark.parametrize("shift", (0, 2, 8))
@pytest.mark.parametrize("type", ("f16", "q8_0"))
def test_tensor_cores_need_rows_at_multiples_of_16(type: str, shift: int) -> None:
    q = gg.input("q", ne=(64, 40, 2))
    k, v = (gg.input(name, type, ne=(64, 100, 2)) for name in "kv")
    names = [launch.name for launch in launches_of(gg.flash_attn_ext(q, k, v, scale=0.2), shift)]
    fits = shift % (4 if type == "q8_0" else 16) == 0
    kernel = "hopper" if fits else "any"
    assert any(name.startswith(kernel) for name in names), names


def test_a_map_of_one_row_has_strides_of_16() -> None:
    """The stride of a dimension of size 1 can be anything, but a map needs multiples of 16."""
    assert steps_of((64, 1, 1, 1), (2, 132, 132, 132)) == [128, 128, 128]
    assert steps_of((64, 9, 1, 2), (2, 160, 7, 4096)) == [160, 160, 4096]
