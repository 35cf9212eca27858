"""Parts of one attention, over different keys, put together."""

from __future__ import annotations

import struct

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.launch import Argument, Call, Operand, Value
from pyggml.backends.cuda.table import kernel

_FILE = "attention_combine.cu"


def _rows(x: Operand | None) -> Value:
    """The struct Rows; an absent operand is null."""
    return Value(
        struct.pack("<5Q", 0, 0, 0, 0, 0) if x is None else struct.pack("<5Q", x.ptr, *x.nb)
    )


def _launch(call: Call, name: str, operands: list[Operand | None], numbers: list[int]) -> None:
    args: list[Argument] = [_rows(x) for x in operands]
    args += [np.int32(n) for n in numbers]
    call.launch(_FILE, name, grid=call.out.ne[1:], block=128, args=args)


@kernel(ops.merge_lse, inplace=("a", "b"))
def merge_lse(call: Call) -> None:
    _launch(call, "merge_lse", [call.out, call.src[0], call.src[1]], [call.out.ne[0] - 1])


@kernel(ops.lse_sum, inplace=("c",))
def lse_sum(call: Call) -> None:
    _launch(call, "lse_sum", [call.out, call.src[0], call.src[1]], [call.out.ne[0] - 2])


@kernel(ops.lse_finish)
def lse_finish(call: Call) -> None:
    c = call.operand(0)
    _launch(call, "lse_finish", [call.out, c], [c.ne[0] - 2, int(call.attrs["lse"])])
