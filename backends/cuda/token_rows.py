"""What a layer does with the rows of a few tokens before it attends, as one launch: queries are
normalized and rotated, rows of caches are made, some of them by compressors."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

from pyggml import ops
from pyggml.backends.cuda import compressor, norm_rope
from pyggml.backends.cuda.argument import Struct, Tensor
from pyggml.backends.cuda.compressor import Compressor
from pyggml.backends.cuda.fusion import CudaStep
from pyggml.backends.cuda.geometry import blocks_for
from pyggml.backends.cuda.launch import Call, Launch, Operand, Record
from pyggml.backends.cuda.rope import Rope
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.dtypes import F32

#: The most tokens.
FEW = 8
#: The kernels that share a launch, and how often at most.
MOST = {"compressed_row": 2, "norm_rope_rows": 1, "norm_rope": 1, "rope": 1}
PLAIN = "Plain<__half>"
_NORM = (("eps", ctypes.c_float), ("rope", Rope))


class CachedRow(Struct):
    """The struct `CachedRow` of token_rows.cu: the arguments of `norm_rope_rows`."""

    _fields_ = (*((name, Tensor) for name in ("cache", "a", "w", "pos", "ids")), *_NORM)


class NormedHeads(Struct):
    """The struct `NormedHeads` of token_rows.cu: the arguments of `norm_rope`."""

    _fields_ = (*((name, Tensor) for name in ("out", "a", "w", "pos")), *_NORM)


class TurnedHeads(Struct):
    """The struct `TurnedHeads` of token_rows.cu: the arguments of `rope`."""

    _fields_ = (
        *((name, Tensor) for name in ("out", "a", "pos", "factors")),
        ("rope", Rope),
        ("units", ctypes.c_int32),
    )


class TokenRows(Struct):
    """The struct `TokenRows` of token_rows.cu."""

    _fields_ = (
        ("compressors", Compressor * 2),
        ("row", CachedRow),
        ("queries", NormedHeads),
        ("turned", TurnedHeads),
        ("ends", ctypes.c_int32 * 5),
    )


def together(steps: Sequence[CudaStep]) -> Iterator[CudaStep]:
    """The steps; those in a row that can share a launch are one."""
    group: list[CudaStep] = []
    for step in steps:
        kind = _kind_of(step)
        if not kind or not _joins(step, kind, group):
            yield from _joined(group)
            group = []
        if kind:
            group.append(step)
        else:
            yield step
    yield from _joined(group)


def _kind_of(step: CudaStep) -> str:
    """The kernel of a step that can share its launch; "" if it cannot."""
    node, record = step.node, getattr(step.record, "func", step.record)
    if record is compressor.record:
        return "compressed_row"
    if record is norm_rope.record:
        if "ids" in step.operands:
            return "norm_rope_rows" if step.operands["ids"].ne[0] <= FEW else ""
        return "norm_rope" if node.ne[2] <= FEW else ""
    alone = len(step.nodes) == 1 and node.op is ops.rope_ext and node.dtype is F32
    return "rope" if alone and node.ne[2] <= FEW and node.ne[3] == 1 else ""


def _joins(step: CudaStep, kind: str, group: Sequence[CudaStep]) -> bool:
    """Whether a step needs nothing from those of a group, changes nothing that they read, and its
    kernel has room for it."""
    nodes = {node for other in group for node in other.nodes}
    written = {node.root for node in nodes if node.op.writes is not None}
    own = {node.root for node in step.nodes if node.op.writes is not None}
    reads = [*step.reads, *(s for node in step.nodes for s in node.src if s is not None)]
    return (
        [_kind_of(other) for other in group].count(kind) < MOST[kind]
        and not any(read.base in nodes or read.root in written for read in reads)
        and not any(read.root in own for other in group for read in other.reads)
    )


def _joined(group: Sequence[CudaStep]) -> Iterator[CudaStep]:
    if len(group) < 2:
        yield from group
        return
    operands = {f"{i}.{name}": x for i, s in enumerate(group) for name, x in s.operands.items()}
    results = {f"{i}.{name}": x for i, s in enumerate(group) for name, x in s.results.items()}
    results |= {f"{i}.out": step.node for i, step in enumerate(group[:-1])}
    yield CudaStep(
        tuple(node for step in group for node in step.nodes),
        operands,
        partial(_record, steps=group),
        results=results,
        scratch=sum(step.scratch + ALIGNMENT for step in group if step.scratch),
    )


def _record(call: Call, steps: Sequence[CudaStep]) -> None:
    records = [record for i, step in enumerate(steps) for record in _part(call, i, step)]
    launches = [record for record in records if isinstance(record, Launch)]
    whole = launch_of(launches) if len(launches) == len(records) == len(steps) else None
    call.records.extend(records if whole is None else [whole])


def _part(call: Call, i: int, step: CudaStep) -> list[Record]:
    """What a step alone records."""
    prefix = f"{i}."
    names = [*step.operands, *step.results]
    operands = {name: call[prefix + name] for name in names}
    out: Operand | None = call.get(prefix + "out")
    scratch = (call.scratch(step.scratch), step.scratch) if step.scratch else (0, 0)
    own = Call(step.node, out or call.out, operands, step.node.attrs, call.device, scratch)
    own.names_only = call.names_only
    step.record(own)
    return own.records


def launch_of(launches: Sequence[Launch]) -> Launch | None:
    """The launches as one, or None if its kernel does not know what they do."""
    parts: dict[str, list[Launch]] = {name: [] for name in MOST}
    types: dict[str, list[str]] = {name: [] for name in MOST}
    for launch in launches:
        name = re.fullmatch(r"(\w+)<(?:(.+), )?false>", launch.name)
        if name is None or name[1] not in parts or (name[1] == "rope" and name[2] != "float"):
            return None
        parts[name[1]].append(launch)
        types[name[1]].append(name[2])
    rows = types["compressed_row"], types["norm_rope_rows"]
    first = (rows[0] + rows[1] or [PLAIN])[0]
    if rows[0] and rows[1] and rows[0][0] != rows[1][0]:
        return None
    threads = max(launch.block[0] for launch in launches)
    order = [*(parts["compressed_row"] + [None, None])[:2]]
    order += [next(iter(parts[name]), None) for name in ("norm_rope_rows", "norm_rope", "rope")]
    blocks = [0 if part is None else part.grid[0] * part.grid[1] for part in order]
    if parts["rope"]:
        (turned,) = parts["rope"]
        blocks[4] = turned.grid[0] * blocks_for(turned.grid[1] * turned.block[0], threads)
    kinds = Compressor, Compressor, CachedRow, NormedHeads, TurnedHeads
    first_rows, second_rows, row, queries, turned_heads = map(_argument, kinds, order)
    argument = TokenRows(
        compressors=(first_rows, second_rows),
        row=row,
        queries=queries,
        turned=turned_heads,
        ends=(*accumulate(blocks),),
    )
    return replace(
        launches[0],
        file="token_rows.cu",
        name=f"token_rows<{first}, {(rows[0][1:] or [first])[0]}>",
        grid=(sum(blocks), 1, 1),
        block=(threads, 1, 1),
        args=bytes(argument),
        shared=max(12 * threads, *(launch.shared for launch in launches)),
    )


def _argument(kind: type[Struct], launch: Launch | None) -> Struct:
    """The arguments of a launch; zeros if there is none."""
    data = b"" if launch is None else launch.args
    return kind.from_buffer_copy(data.ljust(ctypes.sizeof(kind), b"\0"))
