"""Ids past the end are an IdError that names the node; negative ones mean none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import pyggml as gg
from pyggml.errors import IdError
from pyggml.node import Node

a = gg.input("a", "f32", ne=(8, 5))
q = gg.input("a", "q8_0", ne=(32, 5))
e = gg.input("a", "f32", ne=(8, 3, 5))
b = gg.input("b", "f32", ne=(8, 1, 2))
r = gg.input("b", "f32", ne=(8, 3, 2))
ids = gg.input("ids", "i32", ne=(3, 2))
line = gg.input("ids", "i32", ne=(6,))
state = gg.state("s", "f16", ne=(8, 5))
NODES: dict[str, Callable[[], Node]] = {
    "get_rows": lambda: gg.get_rows(a, line),
    "get_rows q8_0": lambda: gg.get_rows(q, line),
    "set_rows": lambda: gg.set_rows(state, gg.repeat(gg.view(a, ne=(8, 1)), ne=(8, 6)), line),
    "add_id": lambda: gg.add_id(r, a, ids),
    "mul_mat_id": lambda: gg.mul_mat_id(e, b, ids),
    "moe_up_gate": lambda: gg.moe_up_gate(e, e, b, ids),
}


@pytest.mark.parametrize("name", NODES)
def test_past_the_end(name: str) -> None:
    plan = gg.compile({"y": gg.label(NODES[name](), "mine")})
    given = {
        key: np.zeros(node.shape) if key != "ids" else np.zeros(node.shape, np.int32)
        for key, node in plan.inputs.items()
    }
    given["ids"].flat[4] = 5
    with pytest.raises(IdError, match="id 5 is past the end: there are 5") as error:
        plan.run(given)
    op = name.split()[0]
    assert isinstance(error.value, IndexError)
    assert str(error.value).startswith(f"{op}(") and __file__ in str(error.value)
    given["ids"].flat[4] = 2**31 - 1
    with pytest.raises(IdError):
        plan.run(given)
    given["ids"][:] = -1
    given["ids"].flat[0] = -(2**31)
    assert not plan.run(given)["y"].any()
    given["ids"][:] = 4  # the same id several times is fine
    plan.run(given)
