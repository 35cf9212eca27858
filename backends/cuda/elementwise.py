"""Element by element: arithmetic, activations, gated units."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run, fuses
from pyggml.backends.cuda.geometry import C_TYPES, blocks_for, counted, pack_width, part
from pyggml.backends.cuda.launch import Argument, Call, Operand
from pyggml.backends.cuda.table import kernel
from pyggml.node import Node
from pyggml.ops.elementwise import ACTIVATIONS

FILE = "elementwise.cu"


def unary(call: Call, name: str, p: float = 0.0, q: float = 0.0) -> None:
    """Record out = name(source 0) with two parameters."""
    out, a = call.out, call.operand(0)
    width = pack_width(out, a)
    index, total = counted(call.node.spec.elements // width)
    call.launch(
        FILE,
        f"unary<{name}, {C_TYPES[out.dtype.name]}, {width}, {index}>",
        grid=blocks_for(int(total)),
        block=256,
        args=[out.tensor, a.tensor, total, np.float32(p), np.float32(q)],
    )


def binary(call: Call, name: str, a: Operand, b: Operand) -> None:
    """Record out = name(a, b), b repeated into a."""
    out = call.out
    width = pack_width(out, a, b)
    index, total = counted(call.node.spec.elements // width)
    call.launch(
        FILE,
        f"binary<{name}, {C_TYPES[out.dtype.name]}, {width}, {index}>",
        grid=blocks_for(int(total)),
        block=256,
        args=[out.tensor, a.tensor, b.tensor, total],
    )


def _unary(name: str) -> Callable[[Call], None]:
    return lambda call: unary(call, name)


def _binary(name: str) -> Callable[[Call], None]:
    return lambda call: binary(call, name, call.operand(0), call.operand(1))


#: The functors of elementwise.cu. An op without one here is no op of this backend.
FUNCTORS = {
    ops.exp: "Exp",
    ops.log: "Log",
    ops.sqr: "Sqr",
    ops.sqrt: "Sqrt",
    ops.tanh: "Tanh",
    ops.relu: "Relu",
    ops.sigmoid: "Sigmoid",
    ops.silu: "Silu",
    ops.gelu: "Gelu",
}
#: Those of activations by name, where one gates something.
GATES = {op.name: functor for op, functor in FUNCTORS.items() if op.name in ACTIVATIONS}
BINARY_FUNCTORS = {ops.add: "Add", ops.sub: "Sub", ops.mul: "Mul", ops.div: "Div"}
for _one, _functor in FUNCTORS.items():
    kernel(_one, inplace=("a",))(_unary(_functor))
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
    x, n = call.operand(0), call.out.ne[0]
    if call.src[1] is not None:
        g = call.operand(1)
    else:
        x, g = part(x, 0, 0, n), part(x, 0, n, n)
    if call.attrs["swapped"]:
        x, g = g, x
    binary(call, f"Glu<{GATES[call.attrs['act']]}>", x, g)


@fuses(ops.mul)
def activated_times(node: Node, run: Run) -> Fused | None:
    """act(x) * g."""
    for act, g in (node.src[:2], node.src[1::-1]):
        if act is None or g is None or act.op.name not in GATES or not run.only(act, node):
            continue
        x = act.src[0]
        if x is not None and x.ne == g.ne == node.ne:
            name = f"Glu<{GATES[act.op.name]}>"
            record = partial(_gated, name=name)
            return Fused((act, node), (x, g), record, inplace=(x, g))
    return None


def _gated(call: Call, name: str) -> None:
    binary(call, name, call.operand(0), call.operand(1))


@kernel(ops.add_id, inplace=("a",))
def add_id(call: Call) -> None:
    """Ids past the end add nothing."""
    operands = [call.operand(i).tensor for i in range(3)]
    grid = (call.out.ne[2], call.out.ne[1])
    call.launch(FILE, "add_id", grid=grid, block=256, args=[call.out.tensor, *operands])


@kernel(ops.causal_mask)
def causal_mask(call: Call) -> None:
    window = call.attrs["window"]
    reach = np.uint32(2**31 if window is None else min(window, 2**31))
    args: list[Argument] = [call.out.tensor, call.operand(0).tensor, reach]
    call.launch(FILE, "causal_mask", grid=call.out.ne[1], block=256, args=args)
