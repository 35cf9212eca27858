"""An id past the end raises an IdError that names the node; a negative id chooses nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.host import HostBackend
from pyggml.backends.table import Kernel, KernelTable
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
    arrays = {
        key: np.zeros(node.shape) if key != "ids" else np.zeros(node.shape, np.int32)
        for key, node in plan.inputs.items()
    }
    arrays["ids"].flat[4] = 5
    with pytest.raises(IdError, match="id 5 is past the end: there are 5") as error:
        plan.run(arrays)
    op = name.split()[0]
    assert isinstance(error.value, IndexError)
    assert str(error.value).startswith(f"{op}(") and __file__ in str(error.value)
    arrays["ids"].flat[4] = 2**31 - 1
    with pytest.raises(IdError):
        plan.run(arrays)
    arrays["ids"][:] = -1
    arrays["ids"].flat[0] = -(2**31)
    assert not plan.run(arrays)["y"].any()
    arrays["ids"][:] = 4  # ids may repeat
    plan.run(arrays)


@pytest.mark.parametrize("name", ["get_rows", "mul_mat_id"])
def test_kernels_of_a_host_backend_need_no_check(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner checks ids before it calls a kernel; a compiled kernel would read past the end."""
    calls: list[str] = []
    kernels = KernelTable(Kernel, {"f32", "i32"})

    class Unchecked(HostBackend):
        name = "unchecked"

    def unchecked(out: Any, *sources: Any, **attrs: Any) -> None:
        calls.append("called")
        out[...] = 0

    node = NODES[name]()
    kernels.kernel(node.op)(unchecked)
    Unchecked.kernels = kernels
    backend = Unchecked()
    monkeypatch.setattr(backends, "get", lambda name, index=0: backend)
    plan = gg.compile({"y": node}, backends=["unchecked"])
    arrays = {key: np.zeros(leaf.shape, np.int32) for key, leaf in plan.inputs.items()}
    plan.run(arrays)
    arrays["ids"].flat[-1] = 5
    with pytest.raises(IdError, match="id 5 is past the end: there are 5"):
        plan.run(arrays)
    assert calls == ["called"]
