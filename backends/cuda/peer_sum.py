"""Sums of small parts, and the norm behind them, by kernels over the memory of other GPUs
(kernels/peer_sum.cu)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import pack
from pyggml.backends.cuda.copy import convert
from pyggml.backends.cuda.fusion import Fused, Run, behind_reshapes
from pyggml.backends.cuda.launch import ABSENT, Call, Collective, Launch, Operand, Tail
from pyggml.backends.cuda.linear.common import aligned
from pyggml.backends.cuda.norm import can_fix, record_norm, weighted
from pyggml.backends.cuda.peers import BOX_HEAD, MOST, Boxes
from pyggml.joint import joint_reduce, places_of
from pyggml.node import Node

FILE = "peer_sum.cu"
#: As in the kernel: elements of a block, and of a part.
CHUNK, BLOCKS = 2048, 16
ROOM = BLOCKS * CHUNK


def words_bytes(count: int) -> int:
    """The bytes of the words of a box, and in front of them."""
    return BOX_HEAD + 2 * count * ROOM * 8


def box_bytes(count: int) -> int:
    """The bytes of the box of one of `count` GPUs, for any plan: words, and the counts of rounds.
    0 if there are no kernels for so many."""
    return words_bytes(count) + 4 * BLOCKS if count <= MOST else 0


def suits(record: Collective) -> bool:
    """Whether the kernels can compute a collective."""
    return (
        record.kind == "all_reduce" and record.type == "f32"
        and record.counts[0] <= ROOM and len(record.places) <= MOST
    )  # fmt: skip


def launch_of(record: Collective, boxes: Boxes, overlap: bool) -> Launch:
    """The launch for a collective, and for what follows in its step."""
    counts = np.uint64(boxes.mine + words_bytes(boxes.count))
    if (tail := record.tail) is not None:
        args = pack([*tail.args, boxes.argument, counts])
        return replace(tail.launch, file=FILE, name=tail.name, args=args)
    n = record.counts[0]
    args = pack(
        [np.uint64(record.target), np.uint64(record.source), np.int32(n), boxes.argument, counts]
    )
    return Launch(FILE, "peer_sum", (-(-n // CHUNK), 1, 1), (512, 1, 1), args, 0, overlap)


def joint_sum_norm(node: Node, run: Run) -> Fused | None:
    """rms_norm(x) * w with x = a + the sum of the parts of all GPUs; x stays in memory if others
    read it. The step takes the place of the sum, so the order of joint steps does not change."""
    match = weighted(node, run)
    if match is None or match[0].op is not ops.add or match[0] not in run.number:
        return None
    x, normed, weight = match
    a, b = x["a"], x["b"]
    total, plus = (a, b) if behind_reshapes(a).op is joint_reduce else (b, a)
    joint = behind_reshapes(total)
    if joint.op is not joint_reduce or not _alone(total, x, run) or not a.ne == b.ne == x.ne:
        return None
    rows = x.spec.elements // x.ne[0]
    if x.spec.elements > ROOM or rows > BLOCKS or len(places_of(joint)) > MOST:
        return None
    return Fused(
        (joint, x, normed, node),
        reads={"part": joint["part"], "plus": plus, "weight": weight},
        record=partial(_record, joint=joint, eps=normed.attrs["eps"]),
        results={} if run.only(x, normed) else {"sum": x},
        inplace=(plus,),
        scratch=2 * aligned(x.spec.nbytes),
        at=joint,
        fixed=can_fix(node),
        halves=1,
    )


def _alone(total: Node, reader: Node, run: Run) -> bool:
    """Whether only `reader` reads a joint sum, through reshapes or not."""
    while total.op is ops.reshape:
        if total in run.keep:
            return False
        total = total["a"]
    return run.only(total, reader)


def _record(call: Call, joint: Node, eps: float) -> None:
    """Record the sum, and behind it what follows. Our own kernel does both."""
    out, part = call.out, call["part"]
    spare, total = (call.scratch(joint.spec.nbytes) for _ in range(2))
    if not part.contiguous or part.ptr % 16:
        plain = Operand(spare, part.ne, joint["part"].spec.nb, part.dtype)
        convert(call, plain, part)
        part = plain
    places = places_of(joint)
    counts = (joint.spec.elements,) * len(places)
    summed = Operand(total, out.ne, call.node.spec.nb, out.dtype)
    start = len(call.records)
    form = record_norm(call, eps, call["plus"], summed)
    launch, *rest = call.records[start:]
    assert isinstance(launch, Launch)
    args = (
        out.tensor, part.pointer, call["weight"].tensor, np.float32(eps), call["plus"].tensor,
        (call.get("sum") or ABSENT).tensor, *form.ends,
    )  # fmt: skip
    name = f"peer_sum_norm<{form.width}, {form.packs}, {form.also}>"
    record = Collective(
        "all_reduce", total, part.ptr, counts, "f32", places, joint.attrs["index"],
        Tail(launch, name, args),
    )  # fmt: skip
    call.records[start:] = [record, launch, *rest]
