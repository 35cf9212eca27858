"""What can be known of the CUDA backend without a GPU: plans, and what each step would launch."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends, passes
from pyggml.backends.base import Address
from pyggml.backends.cuda.launch import Launch, Record
from pyggml.backends.cuda.runner import record_step
from pyggml.dag import Graph
from pyggml.execution import addresses
from pyggml.graph import Node
from pyggml.parity.case import build
from pyggml.parity.cases import cases
from pyggml.passes.work import Work

#: Types whose values only the host decodes, when a weight is loaded.
TABLES = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")
RARE = (*TABLES, "q2_K", "q3_K", "nvfp4", "tq1_0", "tq2_0")


class Memory:
    """Where a buffer would be."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def recorded(node: Node) -> list[Record]:
    """What the steps of a node launch, at addresses that nobody owns."""
    work = passes.run(Work(Graph({"y": node}), (backends.get("cuda"),)))
    arena, leaves = Memory(1 << 40), {}
    for i, leaf in enumerate(work.leaves):
        name = work.layouts[leaf].name if leaf in work.layouts else "plain"
        leaves[leaf] = Address(Memory((2 << 40) + (i << 36)), 0, leaf.spec.nb, name)
    at = addresses(work, leaves, {"cuda:0": arena})
    return [
        one
        for step, offset in zip(work.steps, work.placed.scratch_at)
        for one in record_step(step, at, (arena.ptr + offset, step.scratch))
    ]


def test_every_case_is_recorded_or_refused_for_a_stated_reason() -> None:
    """Scratch within what was declared, geometry within the limits, arguments of known sizes."""
    device, refused, launched = backends.get("cuda"), Counter(), set()
    for case in cases():
        node = build(case, values=False).node
        reason = None if node.op.view is not None else device.supports(node)
        if reason is not None:
            refused[case.op] += 1
            kinds = [s.type for s in case.sources if s is not None]
            assert set(kinds) & set(RARE), f"{case}: {reason}"
            continue
        for one in recorded(node):
            if isinstance(one, Launch):
                launched.add(one.file)
    assert len(launched) >= 10 and set(refused) <= {"mul_mat", "cast", "get_rows"}
    assert sum(refused.values()) < 0.06 * len(cases())


def test_planning_imports_neither_pycuda_nor_cupy() -> None:
    code = (
        "import sys, pyggml as gg\n"
        "w = gg.constant([[1.0] * 256] * 8, type='q8_0', name='w')\n"
        "y = gg.soft_max(gg.mul_mat(w, gg.input('x', ne=(256, 4))))\n"
        "plan = gg.compile({'y': y}, backends=['cuda:0:24GiB'])\n"
        "print(plan, plan.memory)\n"
        "assert not {'pycuda', 'cupy', 'cuda'} & {m.split('.')[0] for m in sys.modules}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cuda:0 was said to have 24576.00 MiB: fits" in done.stdout


def test_running_without_what_it_needs_is_a_named_error() -> None:
    try:
        backends.get("cuda").alloc(0)
    except gg.DeviceError as error:
        assert "pyggml doctor" in str(error)
    else:
        pytest.skip("there is a GPU here")
    plan = gg.compile({"y": gg.relu(gg.input("x", ne=(4,)))}, backends=["cuda"])
    with pytest.raises(gg.DeviceError, match="doctor"):
        plan.run(x=np.zeros(4))
    mixed = gg.compile({"y": gg.relu(gg.input("x", ne=(4,)))}, backends=["numpy", "cuda"])
    np.testing.assert_array_equal(mixed.run(x=np.ones(4))["y"], 1)


def test_experts_on_the_host_and_the_rest_on_a_gpu_are_planned() -> None:
    w = [
        gg.constant(np.ones((8, 64, 256), np.float32), type="q8_0", name=f"ffn_{k}_exps")
        for k in ("up", "gate")
    ]
    square = gg.constant(np.ones((256, 256), np.float32), name="square")
    narrow = gg.constant(np.ones((8, 64), np.float32), name="narrow")
    x = gg.mul_mat(square, gg.rms_norm(gg.input("x", ne=(256, 1, 4)), eps=1e-6))
    y = gg.mul_mat(narrow, gg.moe_up_gate(*w, x, gg.input("ids", "i32", ne=(2, 4))))
    plan = gg.compile({"y": y}, backends=["cuda:0:24GiB", "numpy"], pins={"_exps": "numpy"})
    assert [split.backend.place for split in plan.splits] == ["cuda:0", "numpy", "cuda:0"]


def test_what_a_fused_step_covers_takes_no_memory() -> None:
    x, w = gg.input("x", ne=(1024, 64)), gg.constant(np.ones(1024, np.float32), name="w")
    normed = gg.name(gg.rms_norm(x, eps=1e-6), "normed")
    y = gg.mul(normed, w)
    (step,) = gg.compile({"y": y}, backends=["cuda"]).steps
    assert [node.op.name for node in step.nodes] == ["rms_norm", "mul"]
    assert gg.compile({"y": y}, backends=["cuda"]).memory.compute == y.spec.nbytes
    seen = gg.compile({"y": y}, backends=["cuda"], observe=["normed"])
    assert len(seen.steps) == 2 and seen.memory.compute == 2 * y.spec.nbytes
