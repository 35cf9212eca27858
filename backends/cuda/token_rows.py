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
from pyggml.backends.cuda import compressor, norm_rope, rope
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
#: The most steps that move ahead of others, so that these share a launch.
AHEAD = 8
#: The kernels that share a launch, and how often at most.
MOST = {"compressed_row": 2, "norm_rope_rows": 1, "norm_rope": 1, "rope": 1, "rope_rows": 1}
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


class TurnedRow(Struct):
    """The struct `TurnedRow` of token_rows.cu: the arguments of `rope_rows`."""

    _fields_ = (*((name, Tensor) for name in ("cache", "a", "pos", "ids")), ("rope", Rope))


class TokenRows(Struct):
    """The struct `TokenRows` of token_rows.cu."""

    _fields_ = (
        ("compressors", Compressor * 2),
        ("row", CachedRow),
        ("queries", NormedHeads),
        ("turned", TurnedHeads),
        ("turned_row", TurnedRow),
        ("ends", ctypes.c_int32 * 6),
    )


#: The arguments of the parts, in order.
KINDS = Compressor, Compressor, CachedRow, NormedHeads, TurnedHeads, TurnedRow


def together(steps: Sequence[CudaStep]) -> Iterator[CudaStep]:
    """The steps; those near each other that can share a launch are one, in the last one's place."""
    group: list[CudaStep] = []
    passed = 0
    for step in steps:
        kind = _kind_of(step)
        if kind and _joins(step, kind, group):
            group.append(step)
        elif group and not kind and passed < AHEAD and _is_free(step, group):
            passed += 1
            yield step
        else:
            yield from _joined(group)
            group, passed = [step] if kind else [], 0
            if not kind:
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
    if record is rope.rope_into_row:
        return "rope_rows" if step.operands["ids"].ne[0] <= FEW else ""
    alone = len(step.nodes) == 1 and node.op is ops.rope_ext and node.dtype is F32
    return "rope" if alone and node.ne[2] <= FEW and node.ne[3] == 1 else ""


def _joins(step: CudaStep, kind: str, group: Sequence[CudaStep]) -> bool:
    """Whether the kernel of a group has room for a step that needs nothing from it."""
    same = [other for other in group if _kind_of(other) == kind]
    return len(same) < MOST[kind] and _is_free(step, group)


def _is_free(step: CudaStep, group: Sequence[CudaStep]) -> bool:
    """Whether a step behind a group needs nothing from it and changes nothing that it reads."""
    nodes = {node for other in group for node in other.nodes}
    written = {node.root for node in nodes if node.op.writes is not None}
    own = {node.root for node in step.nodes if node.op.writes is not None}
    reads = [*step.reads, *(s for node in step.nodes for s in node.src if s is not None)]
    needs = any(read.base in nodes or read.root in written for read in reads)
    changes = any(read.root in own for other in group for read in other.reads)
    return not needs and not changes and step.joint is None and not step.workspace


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
    turns = set[str]()  # whether pairs are those of mode "neox"
    for launch in launches:
        name = re.fullmatch(r"(\w+)<(?:(.+), )?(true|false)>", launch.name)
        if name is None or name[1] not in parts or (name[1] == "rope" and name[2] != "float"):
            return None
        turns.add(name[3])
        parts[name[1]].append(launch)
        types[name[1]].append(name[2])
    of_rows = [f"Plain<{name}>" for name in types["rope_rows"]]
    first, *second = types["compressed_row"] or [*types["norm_rope_rows"], *of_rows, PLAIN][:1]
    second = second or [first]
    alike = {first, *types["norm_rope_rows"], *of_rows} == {first}
    if not alike or (turns != {"false"} and (turns != {"true"} or second != [first])):
        return None
    threads = max(launch.block[0] for launch in launches)
    one, two = (*parts.pop("compressed_row"), None, None)[:2]
    order = [one, two, *((*own, None)[0] for own in parts.values())]
    blocks = [0 if part is None else part.grid[0] * part.grid[1] for part in order]
    for i, part in enumerate(order):
        if part is not None and part.file == "rope.cu":
            blocks[i] = part.grid[0] * blocks_for(part.grid[1] * part.block[0], threads)
    arguments = [_argument(kind, part) for kind, part in zip(KINDS, order)]
    names = (name for name, _ in TokenRows._fields_[1:-1])
    argument = TokenRows(
        compressors=tuple(arguments[:2]),
        **dict(zip(names, arguments[2:])),
        ends=(*accumulate(blocks),),
    )
    return replace(
        launches[0],
        file="token_rows.cu",
        name=f"token_rows<{first}, {second[0]}, {turns.pop()}>",
        grid=(sum(blocks), 1, 1),
        block=(threads, 1, 1),
        args=bytes(argument),
        shared=max(12 * threads, *(launch.shared for launch in launches)),
    )


def _argument(kind: type[Struct], launch: Launch | None) -> Struct:
    """The arguments of a launch; zeros if there is none."""
    data = b"" if launch is None else launch.args
    return kind.from_buffer_copy(data.ljust(ctypes.sizeof(kind), b"\0"))
