"""Results whose parts products of several imitated GPUs write into pinned memory."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda.device import prepared
from pyggml.backends.cuda.direct import PLACES
from pyggml.backends.cuda.whole import WholeTogether
from tests.cuda.compared import constant, random
from tests.cuda.test_many_gpus import Imitate, gpus, kernels, same  # noqa: F401

K, M = 64, 512


def head(count: int, more: bool = False, columns: int = 1) -> gg.Plan:
    """A net whose parts are added up, and logits of it, each GPU a part of them."""
    x = gg.input("x", ne=(K, columns))
    up, gate = (constant(name, "q8_0", 192, K) for name in ("up", "gate"))
    y = gg.add(x, gg.mul_mat(constant("down", "q8_0", K, 192), gg.fused_up_gate(up, gate, x)))
    z = gg.mul_mat(constant("output", "q8_0", M, K), gg.mul(y, gg.input("one", ne=(1,))))
    outputs = {"z": z, "y": y} if more else {"z": z}
    places = [f"cuda:{i}" for i in range(count)]
    return gg.compile(outputs, backends=places, shard={"rows": count})


def whole_of(plan: gg.Plan) -> WholeTogether:
    """That of its one kind of runs."""
    assert plan.execution is not None
    (whole,) = plan.execution._wholes.values()
    assert isinstance(whole, WholeTogether)
    return whole


def copies() -> int:
    """How many copies to the host were queued."""
    calls: list[str] = sys.modules["pycuda.driver"].CALLS
    return calls.count("dtoh")


@pytest.mark.parametrize("count", [2, 4])
def test_parts_need_no_copies(
    gpus: Imitate,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    """From the second run on; a kept result does not change, and the parts are in order."""
    gpus(count)
    monkeypatch.setattr(prepared, "LEAST", 4 * M)
    plan, inputs = head(count), [{"x": random(1, K), "one": random(1)} for _ in range(4)]
    copied = [
        {name: values.copy() for name, values in plan.submit(x).result().items()} for x in inputs
    ]
    for x, wanted in zip(inputs, copied):
        same(plan.run(x), wanted)
    before = copies()
    for x, wanted in zip(inputs, copied):
        same(plan.run(x), wanted)
    kept = plan.run(inputs[0])
    for x, wanted in zip(inputs, copied):
        same(plan.run(x), wanted)
    same(kept, copied[0])
    assert copies() == before
    direct = whole_of(plan)._direct
    assert direct is not None and len(direct._graphs) == PLACES


def test_other_outputs_are_copied(gpus: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Several outputs, and a product of many columns."""
    gpus(2)
    monkeypatch.setattr(prepared, "LEAST", 4 * M)
    for plan, columns in ((head(2, more=True), 1), (head(2, columns=40), 40)):
        x: dict[str, Any] = {"x": random(columns, K), "one": np.ones(1, np.float32)}
        first = plan.run(x)
        for _ in range(3):
            same(plan.run(x), first)
        assert whole_of(plan)._direct is None
