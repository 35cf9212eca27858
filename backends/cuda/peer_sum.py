"""Sums of parts, and the norm behind them, by kernels over the memory of other GPUs: of small parts
as words (kernels/peer_sum.cu), of large ones of two GPUs as rows of f16 (peer_rows.py)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from pyggml import ops
from pyggml.backends.cuda import peer_rows
from pyggml.backends.cuda.argument import Argument, pack
from pyggml.backends.cuda.copy import convert
from pyggml.backends.cuda.fusion import Fused, Run, behind_reshapes
from pyggml.backends.cuda.launch import ABSENT, Call, Collective, Launch, Operand, Tail
from pyggml.backends.cuda.linear.common import aligned
from pyggml.backends.cuda.norm import (
    Normed,
    NormForm,
    can_fix,
    left_norm,
    record_norm,
    row_threads,
    weighted,
)
from pyggml.backends.cuda.normed import is_alone
from pyggml.backends.cuda.peers import BOX_HEAD, MOST, Boxes, Round
from pyggml.joint import joint_reduce, places_of
from pyggml.node import Node

FILE = "peer_sum.cu"
#: As in the kernels: elements of a block, and of a part.
CHUNK, BLOCKS = 2048, 16
ROOM = BLOCKS * CHUNK
#: Bytes behind the words, for the number of rounds.
ROUNDS = 64


def words_bytes(count: int) -> int:
    """The bytes of the words of a box, and in front of them."""
    return BOX_HEAD + 2 * count * ROOM * 8


def box_bytes(count: int) -> int:
    """The bytes of the box of one of `count` GPUs, for any plan: words, the number of rounds,
    and rows. 0 if there are no kernels for so many."""
    return _rows_at(count) + peer_rows.box_bytes(count) if count <= MOST else 0


def _rows_at(count: int) -> int:
    """Where in a box the bytes of `peer_rows` begin."""
    return aligned(words_bytes(count) + ROUNDS)


def suits(record: Collective) -> bool:
    """Whether the kernels can compute a collective."""
    return (
        record.kind == "all_reduce" and record.type == "f32"
        and (record.row > 0 or record.counts[0] <= ROOM) and len(record.places) <= MOST
    )  # fmt: skip


def round_of(boxes: Boxes, turn: int) -> Round:
    """The argument of the kernels for small sum number `turn` of a run."""
    rounds = boxes.mine + words_bytes(boxes.count)
    return Round(peers=boxes.argument, rounds=rounds, turn=turn)


def rows_launch(record: Collective, boxes: Boxes, overlap: bool) -> Launch:
    """The launch for a sum of rows, and for what is around it in its step."""
    return peer_rows.launch_of(record, boxes, _rows_at(boxes.count), overlap)


def launch_of(record: Collective, number: Round, sent: bool, overlap: bool) -> Launch:
    """The launch for a small sum, and for what follows in its step. sent: another launch has sent
    the part."""
    if (tail := record.tail) is not None:
        return replace(tail.launch, args=pack([*tail.args, number, np.int32(sent)]))
    n = record.counts[0]
    ends = np.uint64(record.target), np.uint64(record.source)
    args = pack([*ends, np.int32(n), number, np.int32(sent)])
    return Launch(FILE, "peer_sum", (-(-n // CHUNK), 1, 1), (512, 1, 1), args, 0, overlap)


class JointSum(NamedTuple):
    """Nodes of a pattern: x = plus + the sum of the parts of all GPUs, rms_norm(x), its weight."""

    joint: Node
    x: Node
    plus: Node
    normed: Node
    weight: Node

    @property
    def eps(self) -> float:
        eps: float = self.normed.attrs["eps"]
        return eps


def joint_sum(last: Node, run: Run) -> JointSum | None:
    """The nodes of rms_norm(x) * w, if x is a sum over GPUs that our kernels compute."""
    match = weighted(last, run)
    if match is None or match[0].op is not ops.add or match[0] not in run.number:
        return None
    x, normed, weight = match
    a, b = x["a"], x["b"]
    sums = [
        (behind_reshapes(total), plus)
        for total, plus in ((a, b), (b, a))
        if is_alone(total, x, run)
    ]
    sums = [each for each in sums if each[0].op is joint_reduce]
    if not sums or not a.ne == b.ne == x.ne:
        return None
    joint, plus = sums[0]
    width = peer_rows.width_of(joint)
    if width != x.ne[0] if width else not _is_small(x, places_of(joint)):
        return None
    return JointSum(joint, x, plus, normed, weight)


def joint_sum_norm(node: Node, run: Run) -> Fused | None:
    """rms_norm(x) * w with x = a + the sum of the parts of all GPUs; x stays in memory if others
    read it. The step takes the place of the sum, so the order of joint steps does not change."""
    match = joint_sum(node, run)
    if match is None:
        return None
    joint, x, plus, normed, weight = match
    return Fused(
        (joint, x, normed, node),
        reads={"part": joint["part"], "plus": plus, "weight": weight},
        record=partial(_record, joint=joint, eps=match.eps),
        results={} if run.only(x, normed) else {"sum": x},
        inplace=(plus,),
        scratch=aligned(x.spec.nbytes),
        at=joint,
        fixed=can_fix(node),
        halves=1,
    )


def _is_small(x: Node, places: tuple[str, ...]) -> bool:
    """Whether words have room for a sum, and all its rows a block at the same time."""
    n = x.spec.elements
    return n <= ROOM and n // x.ne[0] <= BLOCKS and len(places) <= MOST


def _record(call: Call, joint: Node, eps: float) -> None:
    part, total = call["part"], call.scratch(joint.spec.nbytes)
    if not part.contiguous or part.ptr % 16:
        plain = Operand(total, part.ne, joint["part"].spec.nb, part.dtype)
        convert(call, plain, part)
        part = plain
    record_sum(call, joint, eps, part, total, call["plus"], "halves")


class Part(NamedTuple):
    """How a kernel that adds rows of GPUs computes this GPU's part of them.

    args    of the kernel `name` of `file`, behind the tensor of sums
    covers  launches that have computed the part
    """

    file: str
    name: str
    args: tuple[Argument, ...]
    covers: tuple[Launch, ...]


def record_sum(
    call: Call,
    joint: Node,
    eps: float,
    part: Operand,
    total: int,
    plus: Operand,
    left: str,
    own: Part | None = None,
) -> None:
    """Record the sum of the parts of all GPUs, and behind it x = sum + plus and its norm. Our own
    kernel does all of it, with `own` the part, too; without one, `total` is where the sum will be.
    left: as in record_norm."""
    places = places_of(joint)
    counts = (joint.spec.elements,) * len(places)
    summed = Operand(total, call.out.ne, call.node.spec.nb, call.out.dtype)
    start = len(call.records)
    form = record_norm(call, eps, plus, summed, left)
    launches = tuple(r for r in call.records[start:] if isinstance(r, Launch))
    row = peer_rows.width_of(joint)
    if row:
        own = own or Part(peer_rows.FILE, "peer_rows_norm", (part.pointer,), ())
        tail = _rows_tail(call, left_norm(call, eps, left), plus, own, launches)
    else:
        tail = _words_tail(call, eps, plus, part, form, launches[0])
    record = Collective(
        "all_reduce", total, part.ptr, counts, "f32", places, joint.attrs["index"], tail, row
    )
    call.records[start:] = [record, *launches]


def _words_tail(
    call: Call, eps: float, plus: Operand, part: Operand, form: NormForm, launch: Launch
) -> Tail:
    args = (
        call.out.tensor, part.pointer, call["weight"].tensor, np.float32(eps), plus.tensor,
        (call.get("sum") or ABSENT).tensor, *form.ends,
    )  # fmt: skip
    name = f"peer_sum_norm<{form.width}, {form.packs}, {form.also}>"
    return Tail(replace(launch, file=FILE, name=name, args=b""), args, (launch,))


def _rows_tail(
    call: Call, norm: Normed | None, plus: Operand, own: Part, launches: tuple[Launch, ...]
) -> Tail | None:
    out = call.out
    total = call.get("sum") or replace(out, ptr=0)
    flat = all(x.nb[0] == 4 and x.aligned(16) and x.ne[2:] == (1, 1) for x in (total, plus))
    if norm is None or not flat:
        return None
    most, threads = row_threads(out.ne[0])
    launch = Launch(
        own.file, f"{own.name}<{most}>", (out.ne[1], 1, 1), (threads, 1, 1), b"", 0,
        call.device.overlaps,
    )  # fmt: skip
    return Tail(launch, (total.tensor, *own.args, plus.tensor, norm), (*own.covers, *launches))
