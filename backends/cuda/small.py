"""Many elementwise ops on a few numbers as one launch.

What follows from positions (rows of rings, windows that end, places in them) is dozens of ops on
one to a hundred numbers each, and each launch takes 2 us. One block computes them one after
another.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pyggml import ops
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.fusion import CudaStep
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.linear.common import aligned
from pyggml.dtypes import F32, I32
from pyggml.node import Node
from pyggml.operation import Op
from pyggml.ops.leaf import state_op

FILE = "small.cu"
_OPS: tuple[Op[Any], ...] = (
    ops.cont, ops.cast, ops.fill, ops.scale, ops.clamp, ops.add, ops.sub, ops.mul, ops.div,
)  # fmt: skip
#: Ops, by their numbers in the kernel.
OPS = {op: number for number, op in enumerate(_OPS)}
#: The most ops of a launch, and the fewest; the most numbers of an op.
MOST, LEAST, LONGEST = 64, 4, 1024


class Instruction(Struct):
    """The struct `Instruction` of small.cu."""

    _fields_ = (
        ("to", ctypes.c_uint64),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
        ("step_a", ctypes.c_int32),
        ("step_b", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("op", ctypes.c_int32),
        ("from_int", ctypes.c_int16),
        ("to_int", ctypes.c_int16),
        ("p", ctypes.c_float),
        ("q", ctypes.c_float),
    )


class Program(Struct):
    """The struct `Program` of small.cu."""

    _fields_ = (("list", Instruction * MOST), ("count", ctypes.c_int32))


def gather(steps: Sequence[CudaStep], keep: Collection[Node]) -> Iterator[CudaStep]:
    """The steps, with small ones gathered where the first of them is. A step joins the earliest
    group before which all is computed that it reads, if that is not in the group."""
    places = {node: i for i, step in enumerate(steps) for node in step.nodes}
    groups: dict[int, list[CudaStep]] = {}
    place_of: dict[Node, int] = {}
    for i, step in enumerate(steps):
        if not _is_small(step):
            continue
        sources = [node.base for node in step.reads]
        place = next(
            (
                at
                for at, own in groups.items()
                if len(own) < MOST
                and all(places.get(s, -1) < at or place_of.get(s) == at for s in sources)
            ),
            i,
        )
        groups.setdefault(place, []).append(step)
        place_of[step.node] = place
    large = {at: own for at, own in groups.items() if len(own) >= LEAST}
    readers: dict[Node, set[int]] = {}  # of a node: the groups of steps that read it, or -1
    for step in steps:
        place = place_of.get(step.node, -1)
        for node in step.reads:
            readers.setdefault(node.base, set()).add(place if place in large else -1)
    for i, step in enumerate(steps):
        if i in large:
            nodes = tuple(each.node for each in large[i])
            yield _gathered(nodes, [n in keep or readers.get(n, set()) != {i} for n in nodes])
        elif place_of.get(step.node, -1) not in large:
            yield step


def _is_small(step: CudaStep) -> bool:
    """Whether the kernel knows the op, types and sizes."""
    node = step.node
    if len(step.nodes) > 1 or node.op not in OPS or not _is_row(node):
        return False
    sources = [s for s in node.src if s is not None]
    if not all(_is_row(s) and s.ne[0] in (1, node.ne[0]) for s in sources):
        return False
    if any(s.root.op is state_op for s in sources):
        return False
    return node.op in (ops.cont, ops.cast) or all(s.dtype is F32 for s in (*sources, node))


def _is_row(node: Node) -> bool:
    return node.dtype in (F32, I32) and node.ne[0] == node.spec.elements <= LONGEST


def _gathered(nodes: tuple[Node, ...], stored: Sequence[bool]) -> CudaStep:
    """The step of several nodes; those that are not stored are in its scratch."""
    operands = {
        f"{name}{i}": node[name]
        for i, node in enumerate(nodes)
        for name in ("a", "b")
        if name in node.op.operands and node.get(name) is not None
    }
    operands = {name: node for name, node in operands.items() if node.base not in nodes}
    results = {f"y{i}": node for i, node in enumerate(nodes[:-1]) if stored[i]}
    scratch = sum(_room(node) for i, node in enumerate(nodes[:-1]) if not stored[i])
    return CudaStep(
        nodes, operands, lambda call: _record(call, nodes), results=results, scratch=scratch
    )


def _room(node: Node) -> int:
    return aligned(node.spec.nbytes)


def _record(call: Call, nodes: Sequence[Node]) -> None:
    to: dict[Node, int] = {}
    for i, node in enumerate(nodes):
        out = call.out if i == len(nodes) - 1 else call.get(f"y{i}")
        to[node] = call.scratch(_room(node)) if out is None else out.ptr
    program = [_instruction(call, i, node, to) for i, node in enumerate(nodes)]
    spare = MOST - len(program)
    call.launch(
        FILE,
        "small",
        grid=1,
        block=256,
        args=[Program(list=(*program, *program[:1] * spare), count=len(nodes))],
    )


def _source(call: Call, name: str, node: Node, to: Mapping[Node, int]) -> tuple[int, int]:
    """The address of an operand and its step in bytes, 0 if it is one number."""
    operand = call.get(name)
    if operand is not None:
        return operand.ptr, operand.nb[0] if node.ne[0] > 1 else 0
    address, view = to[node.base], node
    while view.op.view is not None and view.src[0] is not None:
        address, view = address + view.offset, view.src[0]
    return address, node.nb[0] if node.ne[0] > 1 else 0


def _instruction(call: Call, i: int, node: Node, to: Mapping[Node, int]) -> Instruction:
    first, second = node["a"], node.get("b") if "b" in node.op.operands else None
    a, step_a = _source(call, f"a{i}", first, to)
    b, step_b = (0, 0) if second is None else _source(call, f"b{i}", second, to)
    numbers = {ops.scale: ("s", "b"), ops.clamp: ("min", "max"), ops.fill: ("value",)}
    p, q = (*(node.attrs[name] for name in numbers.get(node.op, ())), 0.0, 0.0)[:2]
    return Instruction(
        to=to[node],
        a=a,
        b=b,
        step_a=step_a,
        step_b=step_b,
        n=node.ne[0],
        op=OPS[node.op],
        from_int=first.dtype is I32,
        to_int=node.dtype is I32,
        p=p,
        q=q,
    )
