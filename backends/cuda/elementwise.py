"""Elementwise ops: arithmetic, activations, gated units."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.device.compiler import KERNELS
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import C_TYPES, blocks_for, counted, pack_width, part
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.table import kernel
from pyggml.node import Node
from pyggml.operation import Op
from pyggml.ops.elementwise import ACTIVATIONS, BINARY, UNARY

FILE = "elementwise.cu"


def unary(call: Call, name: str, p: float = 0.0, q: float = 0.0) -> None:
    """Record out = name(a), with parameters p and q."""
    out, a = call.out, call["a"]
    width = pack_width(out, a)
    index, total = counted(call.node.spec.elements // width)
    call.launch(
        FILE,
        f"unary<{name}, {C_TYPES[out.dtype.name]}, {width}, {index}>",
        grid=blocks_for(int(total)),
        block=256,
        args=[out.tensor, a.tensor, total, np.float32(p), np.float32(q)],
    )


def binary(call: Call, name: str, a: Operand, b: Operand, limit: float | None = None) -> None:
    """Record out = name(a, b), with b repeated to the sizes of a; `limit` is that of a Glu."""
    out = call.out
    width = pack_width(out, a, b)
    index, total = counted(call.node.spec.elements // width)
    call.launch(
        FILE,
        f"binary<{name}, {C_TYPES[out.dtype.name]}, {width}, {index}{', float' * bool(limit)}>",
        grid=blocks_for(int(total)),
        block=256,
        args=[out.tensor, a.tensor, b.tensor, total, *([np.float32(limit)] if limit else [])],
    )


def _unary(name: str) -> Callable[[Call], None]:
    return lambda call: unary(call, name)


def _binary(name: str) -> Callable[[Call], None]:
    return lambda call: binary(call, name, call["a"], call["b"])


def functors(macro: str, family: Iterable[Op[Any]]) -> dict[Op[Any], str]:
    """Op -> its functor, for the ops of a family that elementwise.cu defines by `macro`. The others
    have no kernel here."""
    names = re.findall(rf"^{macro}\((\w+),", (KERNELS / FILE).read_text(), re.MULTILINE)
    by_op = {op: op.name.title().replace("_", "") for op in family}
    return {op: name for op, name in by_op.items() if name in names}


UNARY_FUNCTORS = functors("UNARY", UNARY)
BINARY_FUNCTORS = functors("BINARY", BINARY)
#: The functors of activations that may gate, by the name of the activation.
GATES = {op.name: functor for op, functor in UNARY_FUNCTORS.items() if op.name in ACTIVATIONS}
for _op, _functor in UNARY_FUNCTORS.items():
    kernel(_op, inplace=("a",))(_unary(_functor))
for _pair, _functor in BINARY_FUNCTORS.items():
    kernel(_pair, inplace=("a",))(_binary(_functor))


@kernel(ops.scale, inplace=("a",))
def scale(call: Call) -> None:
    unary(call, "Scale", call.attrs["s"], call.attrs["b"])


@kernel(ops.clamp, inplace=("a",))
def clamp(call: Call) -> None:
    unary(call, "Clamp", call.attrs["min"], call.attrs["max"])


@kernel(ops.fill, inplace=("a",))
def fill(call: Call) -> None:
    unary(call, "Fill", call.attrs["value"])


@kernel(ops.glu)
def glu(call: Call) -> None:
    x, g, n = call["a"], call.get("b"), call.out.ne[0]
    if g is None:
        x, g = part(x, 0, 0, n), part(x, 0, n, n)
    if call.attrs["swapped"]:
        x, g = g, x
    binary(call, f"Glu<{GATES[call.attrs['act']]}>", x, g, call.attrs["limit"])


def activated_times(node: Node, run: Run) -> Fused | None:
    """act(x) * g, with the operands in either order."""
    for act, g in ((node["a"], node["b"]), (node["b"], node["a"])):
        if act.op.name not in GATES or not run.only(act, node):
            continue
        x = act["a"]
        if x.ne == g.ne == node.ne:
            record = _binary(f"Glu<{GATES[act.op.name]}>")
            return Fused((act, node), {"a": x, "b": g}, record, inplace=(x, g))
    return None


@kernel(ops.add_id, inplace=("a",))
def add_id(call: Call) -> None:
    """Record the sum. Ids past the end add nothing."""
    args = [x.tensor for x in (call.out, call["a"], call["b"], call["ids"])]
    grid = (call.out.ne[2], call.out.ne[1])
    call.launch(FILE, "add_id", grid=grid, block=256, args=args)
