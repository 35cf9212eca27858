"""Block types: the CUDA backend runs a type that has a format, and refuses any other type."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as gg
from pyggml import quants
from pyggml.backends.cuda.table import KERNELS
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.dtypes import TYPES
from pyggml.node import Node

BLOCKS = sorted(name for name in quants.DECODABLE if TYPES[name].kind == "block")


def weight(name: str, *ne: int) -> Node:
    dtype = TYPES[name]
    raw = np.zeros((*ne[:0:-1], dtype.row_bytes(ne[0])), np.uint8)
    return gg.constant(raw, dtype=dtype)


def readers(name: str) -> list[Node]:
    """Nodes that read weights of a type: products, a gather, a copy."""
    x, ids = gg.input("x", ne=(256, 3)), gg.input("ids", "i32", ne=(2,))
    experts, slots = weight(name, 256, 4, 2), gg.input("slots", "i32", ne=(2, 3))
    b = gg.reshape(x, ne=(256, 1, 3))
    w = weight(name, 256, 4)
    return [
        gg.mul_mat(w, x),
        gg.get_rows(w, ids),
        gg.mul_mat_id(experts, b, slots),
        gg.moe_up_gate(experts, experts, b, slots),
        gg.fused_up_gate(w, w, x),
        gg.cont(gg.view(w, ne=(256, 2))),
    ]


@pytest.mark.parametrize("name", BLOCKS)
def test_only_a_type_without_a_format_is_refused(name: str) -> None:
    reason = None if name in FORMATS else f"no kernel for blocks of {name}"
    for node in readers(name):
        assert KERNELS.refusal(node) == reason, node.op.name


def test_a_type_without_a_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the graph is planned, not when a kernel is compiled."""
    monkeypatch.delitem(FORMATS, "q1_0")
    test_only_a_type_without_a_format_is_refused("q1_0")
