"""Block types: what the kernels read is claimed, what only the package decodes is not."""

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
    kind = TYPES[name]
    raw = np.zeros((*ne[:0:-1], kind.row_bytes(ne[0])), np.uint8)
    return gg.constant(raw, dtype=kind)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_type_without_a_format_is_refused(name: str) -> None:
    """Not claimed and then found missing by the compiler of the kernels."""
    x, ids = gg.input("x", ne=(256, 3)), gg.input("ids", "i32", ne=(2,))
    experts, chosen = weight(name, 256, 4, 2), gg.input("chosen", "i32", ne=(2, 3))
    b = gg.reshape(x, ne=(256, 1, 3))
    w = weight(name, 256, 4)
    nodes = [
        gg.mul_mat(w, x),
        gg.get_rows(w, ids),
        gg.mul_mat_id(experts, b, chosen),
        gg.moe_up_gate(experts, experts, b, chosen),
        gg.fused_up_gate(w, w, x),
        gg.cont(gg.view(w, ne=(256, 2))),
    ]
    for node in nodes:
        assert (KERNELS.refusal(node) is None) == (name in FORMATS), node.op.name
        if name not in FORMATS:
            assert KERNELS.refusal(node) == f"no kernel for blocks of {name}"
