"""Joint steps by NCCL, which is called inside the recorded graphs (device/nccl.py).

The result is in one piece. A part may be a strided piece of a concat; it is then put in order
first, where the result will be.
"""

from __future__ import annotations

from pyggml.backends.cuda.copy import convert
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.peer_rows import width_of
from pyggml.backends.cuda.table import kernel
from pyggml.errors import PyggmlError
from pyggml.joint import joint_gather, joint_receive, joint_reduce, joint_scatter, joint_send

SUMMED = ("f32", "f16")


def _ordered(call: Call, target: int) -> int:
    """The address of the part without gaps; `target` has room for it."""
    part = call["part"]
    if part.contiguous:
        return part.ptr
    plain = Operand(target, part.ne, call.node["part"].spec.nb, part.dtype)
    convert(call, plain, part)
    return target


@kernel(joint_reduce, types=SUMMED, inplace=("part",))
def reduce_parts(call: Call) -> None:
    counts = (call.node.spec.elements,) * len(call.attrs["places"])
    source, row = _ordered(call, call.out.ptr), width_of(call.node)
    call.collective("all_reduce", source, counts, call.out.dtype.name, row)


@kernel(joint_gather, types=None)
def gather_parts(call: Call) -> None:
    dtype = call.out.dtype
    nbytes = tuple(dtype.row_bytes(n) for n in call.attrs["sizes"])
    start = sum(nbytes[: call.attrs["index"]])
    call.collective("all_gather", _ordered(call, call.out.ptr + start), nbytes, "bytes")


@kernel(joint_scatter, types=SUMMED)
def scatter_parts(call: Call) -> None:
    part = call["part"]
    if not part.contiguous:
        raise PyggmlError("a part of reduce_scatter must be in one piece; use cont(part) first")
    counts = (call.node.spec.elements,) * len(call.attrs["places"])
    call.collective("reduce_scatter", part.ptr, counts, call.out.dtype.name)


@kernel(joint_send, types=None)
def send(call: Call) -> None:
    part = call["part"]
    assert part.contiguous
    call.collective("send", part.ptr, (call.node["part"].spec.nbytes,), "bytes")


@kernel(joint_receive, types=None)
def receive(call: Call) -> None:
    call.collective("receive", 0, (call.node.spec.nbytes,), "bytes")
