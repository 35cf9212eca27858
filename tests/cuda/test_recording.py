"""The CUDA backend without a GPU: its plans, and the launches that each step records."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends, ops, passes
from pyggml.backends.cuda.device.compiler import KERNELS
from pyggml.backends.cuda.elementwise import functors
from pyggml.backends.cuda.launch import Launch, Record
from pyggml.backends.cuda.recording import record_step
from pyggml.backends.cuda.table import KERNELS as TABLE
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.backends.step import Address, Step
from pyggml.graph import Graph
from pyggml.node import Node
from pyggml.operation import Op
from pyggml.parity.case import Case, build
from pyggml.parity.cases import BLOCKS, cases
from pyggml.passes.work import Work
from pyggml.runtime.execution import addresses
from tools.compile_kernels import instances


class Memory:
    """A buffer with an address and no memory."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def steps_of(node: Node) -> list[tuple[Step, list[Record]]]:
    """The steps of a node and their records, at made-up addresses."""
    work = passes.run(Work(Graph({"y": node}), (backends.get("cuda"),)))
    arena, leaves = Memory(1 << 40), {}
    for i, leaf in enumerate(work.leaves):
        name = work.layouts[leaf].name if leaf in work.layouts else "plain"
        leaves[leaf] = Address(Memory((2 << 40) + (i << 36)), 0, leaf.spec.nb, name)
    at = addresses(work, leaves, {"cuda:0": arena})
    return [
        (step, record_step(step, at, (arena.ptr + offset, step.scratch)))
        for step, offset in zip(work.steps, work.placed.scratch_at)
    ]


def records_of(node: Node) -> list[Record]:
    """The records of all steps of a node."""
    return [record for _, records in steps_of(node) for record in records]


#: Block types that only the host decodes.
UNREAD = {name for name in BLOCKS.split("|") if name not in FORMATS}


def recordable() -> Iterator[tuple[Case, Node]]:
    """The cases of the grid without those of blocks that the host decodes (test_block_types.py),
    and without ops that have no CUDA kernel: an op may run on the host alone until it gets one.
    Nodes that a kernel refuses are left out too; the cases of their meaning are recorded.

    docs/ops.md lists those ops, and its own test fails if one joins or leaves them.
    """
    backends.get("cuda")
    for case in cases():
        node = build(case, values=False).node
        unread = any(s is not None and s.type in UNREAD for s in case.sources)
        if unread:
            continue
        if node.op.view is not None or (node.op in TABLE and TABLE[node.op].refuses(node) is None):
            yield case, node


def test_every_case_is_recorded() -> None:
    """Only blocks without a format are refused. Scratch is as declared, the geometry is within
    limits, and the sizes of arguments are known."""
    device, files = backends.get("cuda"), set()
    for case, node in recordable():
        assert node.op.view is not None or device.supports(node) is None, case
        files |= {record.file for record in records_of(node) if isinstance(record, Launch)}
    assert len(files) >= 10


def test_an_op_without_a_kernel_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(node.op is ops.relu for _, node in recordable())
    monkeypatch.delitem(TABLE, ops.relu)
    assert not any(node.op is ops.relu for _, node in recordable())


def test_planning_imports_neither_pycuda_nor_cupy() -> None:
    code = (
        "import sys, pyggml as gg\n"
        "w = gg.constant([[1.0] * 256] * 8, dtype='q8_0', name='w')\n"
        "y = gg.soft_max(gg.mul_mat(w, gg.input('x', ne=(256, 4))))\n"
        "plan = gg.compile({'y': y}, backends=['cuda:0:24GiB'])\n"
        "print(plan, plan.memory)\n"
        "assert not {'pycuda', 'cupy', 'cuda'} & {m.split('.')[0] for m in sys.modules}\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "cuda:0 (assumed 24GiB): fits" in result.stdout


def test_experts_on_the_host_split_the_plan() -> None:
    w = [
        gg.constant(np.ones((8, 64, 256), np.float32), dtype="q8_0", name=f"ffn_{k}_exps")
        for k in ("up", "gate")
    ]
    square = gg.constant(np.ones((256, 256), np.float32), name="square")
    narrow = gg.constant(np.ones((8, 64), np.float32), name="narrow")
    x = gg.mul_mat(square, gg.rms_norm(gg.input("x", ne=(256, 1, 4)), eps=1e-6))
    y = gg.mul_mat(narrow, gg.moe_up_gate(*w, x, gg.input("ids", "i32", ne=(2, 4))))
    plan = gg.compile({"y": y}, backends=["cuda:0:24GiB", "numpy"], pins={"_exps": "numpy"})
    assert [split.backend.place for split in plan.splits] == ["cuda:0", "numpy", "cuda:0"]


def test_a_sum_that_only_its_norm_reads_takes_no_memory() -> None:
    x, s = gg.input("x", ne=(256, 4)), gg.input("s", ne=(256, 4))
    normed = gg.rms_norm(gg.add(x, s), eps=1e-6)
    y = gg.mul(normed, gg.constant(np.ones(256, np.float32), name="w"))
    names = [r.name.partition("<")[0] for r in records_of(y) if isinstance(r, Launch)]
    assert names == ["rms_norm"]
    assert gg.compile({"y": y}, backends=["cuda"]).memory.compute == y.spec.nbytes


def test_intermediates_of_a_fused_step_take_no_memory() -> None:
    x, w = gg.input("x", ne=(1024, 64)), gg.constant(np.ones(1024, np.float32), name="w")
    normed = gg.label(gg.rms_norm(x, eps=1e-6), "normed")
    y = gg.mul(normed, w)
    (step,) = gg.compile({"y": y}, backends=["cuda"]).steps
    assert [node.op.name for node in step.nodes] == ["rms_norm", "mul"]
    assert gg.compile({"y": y}, backends=["cuda"]).memory.compute == y.spec.nbytes
    observed = gg.compile({"y": y}, backends=["cuda"], observe=["normed"])
    assert len(observed.steps) == 2 and observed.memory.compute == 2 * y.spec.nbytes


#: Words that may be in the arguments of any template: element types and block types.
_PLAIN = {"unsigned", "short", "long", "int", "char", "float", "void", "true", "false"}
_PLAIN |= {"__half", "__nv_bfloat16", *FORMATS}


def _words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))


def test_every_instance_has_its_template() -> None:
    """A name that matches no `// @kernel` line of its file would fail only on a GPU."""
    declared: dict[tuple[str, str], set[str]] = {}
    for instance in instances(sorted(KERNELS.glob("*.cu"))):
        template = instance.name.partition("<")[0]
        declared.setdefault((instance.file, template), set()).update(_words(instance.name))
    for case, node in recordable():
        for launch in records_of(node):
            if isinstance(launch, Launch):
                key = launch.file, launch.name.partition("<")[0]
                assert key in declared, f"{case}: {launch.file} has no kernel {launch.name}"
                unknown = _words(launch.name) - declared[key] - _PLAIN
                assert not unknown, f"{case}: {launch.name}: no @kernel line has {unknown}"


@pytest.mark.parametrize("macro", ["UNARY", "BINARY"])
def test_every_functor_is_that_of_an_op_and_the_reverse(macro: str) -> None:
    """elementwise.cu is the only list of these ops."""
    family = getattr(ops.elementwise, macro)
    claimed = functors(macro, family)
    defined = re.findall(rf"\b{macro}\(\s*(\w+)\s*,", (KERNELS / "elementwise.cu").read_text())
    assert sorted(claimed.values()) == sorted(set(defined) - {"Name"})
    assert len(defined) == len(set(defined)) and claimed.keys() == TABLE.keys() & {*family}
    words = re.split(r"\W+", " ".join(i.name for i in instances([KERNELS / "elementwise.cu"])))
    assert {*claimed.values()} <= {*words}, "`make kernels` does not compile some"
    assert not functors(macro, [Op(lambda a: a.spec, name="gelu_quick")])
