"""Merging the parts of one attention over different keys."""

from __future__ import annotations

import ctypes

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import Argument, Struct
from pyggml.backends.cuda.launch import ABSENT, Call, Operand
from pyggml.backends.cuda.table import kernel

_FILE = "attention_combine.cu"


class Rows(Struct):
    """The struct `Rows` of attention_combine.cu: rows in f32, or null."""

    _fields_ = (("at", ctypes.c_uint64), ("nb0", ctypes.c_int64), ("nb", ctypes.c_int64 * 3))


def _launch(call: Call, name: str, operands: list[Operand], numbers: list[int]) -> None:
    args: list[Argument] = [Rows(at=x.ptr, nb0=x.nb[0], nb=x.nb[1:]) for x in operands]
    args += [np.int32(n) for n in numbers]
    call.launch(_FILE, name, grid=call.out.ne[1:], block=128, args=args)


@kernel(ops.merge_lse, inplace=("a", "b"))
def merge_lse(call: Call) -> None:
    _launch(call, "merge_lse", [call.out, call["a"], call["b"]], [call.out.ne[0] - 1])


@kernel(ops.lse_sum, inplace=("c",))
def lse_sum(call: Call) -> None:
    so_far = call.get("c") or ABSENT
    _launch(call, "lse_sum", [call.out, call["a"], so_far], [call.out.ne[0] - 2])


@kernel(ops.lse_finish)
def lse_finish(call: Call) -> None:
    c = call["c"]
    _launch(call, "lse_finish", [call.out, c], [c.ne[0] - 2, int(call.attrs["lse"])])
