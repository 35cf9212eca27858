"""A case: one op over described sources, as text and as a graph with values for the oracle."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pyggml import ops
from pyggml.dtypes import DType, dtype
from pyggml.errors import GraphError
from pyggml.graph import Node
from pyggml.parity import oracle, tolerance
from pyggml.plan import compile
from pyggml.quants import ENCODABLE, decode_rows, encode_rows
from pyggml.store import Store

Array = NDArray[Any]

_SOURCE = re.compile(
    r"(?P<type>\w+)\[(?P<ne>[\d,]+)\](?P<fill>[<!#]\d+-?|~\w+)?"
    r"(?:@(?P<layout>\w+))?(?:=(?P<of>\d)\+(?P<start>\d+))?"
)
#: Layouts: elements (on dimension 0: blocks) before and after the tensor, and its steps.
_LAYOUTS = {
    "wide": ((1, 0, 0, 0), (1, 0, 0, 0), (1, 1, 1, 1)),
    "inner": ((1, 2, 1, 1), (2, 1, 1, 0), (1, 1, 1, 1)),
    "step": ((0, 0, 0, 0), (0, 0, 0, 0), (1, 2, 1, 1)),
}
#: What lies around a tensor: nothing may read it.
_POISON = {"float": np.nan, "int": 2**31 - 1, "block": 0xFF}
#: Ops whose results are their sources' values, moved: nothing is computed, nothing may change.
_MOVES = {"reshape", "view", "permute", "transpose", "cont", "concat", "repeat", "get_rows"}


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of a case. Its text: `f16[64,5]`, `i32[6,5]<8-`, `f32[64,5]@wide`, `f16[512,9]=1+64`

    fill    what it holds; nothing: normal values.   <8: ids below 8;  <8-: negative ones too;
            !8: ids below 8, all different in a row;  #9: the number 9;  ~mask: a third -inf, row 1
            all of it;  ~above: above 0;  ~ties: small whole numbers;  ~wild: inf, NaN, subnormals
    layout  how it lies in memory, NaN around it.   wide: rows in longer rows;  inner: a part in
            every dimension;  step: every other row;  p0213: ggml's permute(memory, (0, 2, 1, 3))
    of      it is a view of that other source, `start` elements into each row
    """

    type: str
    ne: tuple[int, ...]
    fill: str = ""
    layout: str = ""
    of: int | None = None
    start: int = 0

    def __str__(self) -> str:
        layout = f"@{self.layout}" if self.layout else ""
        view = "" if self.of is None else f"={self.of}+{self.start}"
        return f"{self.type}[{','.join(map(str, self.ne))}]{self.fill}{layout}{view}"

    @staticmethod
    def parse(text: str) -> Source | None:
        """The source that prints as `text`; None for an absent one, `-`."""
        if text == "-":
            return None
        found = _SOURCE.fullmatch(text)
        if found is None:
            raise GraphError(f"{text!r} is no source; a source looks like f16[64,5]@wide")
        ne = tuple(int(n) for n in found["ne"].split(","))
        of = None if found["of"] is None else int(found["of"])
        start = int(found["start"] or 0)
        return Source(found["type"], ne, found["fill"] or "", found["layout"] or "", of, start)


@dataclass(frozen=True, slots=True)
class Case:
    """`op(*sources, **attrs)`; its text is that too: `mul_mat(q4_K[256,16], f32[256,5])`."""

    op: str
    sources: tuple[Source | None, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ["-" if s is None else str(s) for s in self.sources]
        return f"{self.op}({', '.join([*parts, *(f'{k}={v!r}' for k, v in self.attrs.items())])})"

    @staticmethod
    def parse(text: str) -> Case:
        """The case that prints as `text`."""
        found = re.fullmatch(r"(\w+)\((.*)\)", text)
        if found is None:
            raise GraphError(f"{text!r} is no case; a case looks like relu(f32[64,5])")
        sources, attrs = [], {}
        for part in re.findall(r"(?:[^,(\[]|\([^)]*\)|\[[^\]]*\])+", found[2]):
            key, equal, value = part.strip().partition("=")
            if equal and key.isidentifier():
                attrs[key] = _value(value)
            else:
                sources.append(Source.parse(part.strip()))
        return Case(found[1], tuple(sources), attrs)

    def bound(self, result: Node) -> float:
        """The NMSE that a backend which quantizes nothing may have."""
        kind, first = result.dtype, self.sources[1 if self.op == "set_rows" else 0]
        if kind.kind == "int" or self.op in _MOVES:
            return 0.0
        if self.op in ("cast", "cpy", "set_rows"):
            exact = self.op == "cast" and kind.name in ("f32", "f16", "bf16")
            same = first is not None and first.type == kind.name
            return 0.0 if exact or same else tolerance.STORAGE[kind.name]
        return tolerance.bound(self.op, "f16" if kind.name == "f16" else "f32")


def _value(text: str) -> Any:
    return float(text) if text.lstrip("-") in ("inf", "nan") else ast.literal_eval(text)


# -- values -----------------------------------------------------------------------------------


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], fill: str) -> Array:
    if fill[:1] in ("<", "!"):
        count = int(fill[1:].rstrip("-"))
        if fill[0] == "<":
            return rng.integers(-2 if fill.endswith("-") else 0, count, shape)
        lines = [rng.permutation(count)[: shape[-1]] for _ in range(int(np.prod(shape[:-1])))]
        return np.array(lines).reshape(shape)
    if fill.startswith("#"):
        return np.full(shape, int(fill[1:]))
    values = rng.standard_normal(shape)
    if fill == "~mask":
        hidden = rng.random(shape) < 0.3
        hidden[..., 1:2, :] = True
        return np.where(hidden, -np.inf, values)
    if fill == "~above":
        return np.abs(values) + 0.01
    if fill == "~ties":
        return np.rint(2 * values)
    if fill == "~wild":
        special = rng.choice([np.inf, -np.inf, np.nan, 1e-40, 0.0], shape)
        return np.where(rng.random(shape) < 0.2, special, values)
    return values


def _stored(kind: DType, values: Array, rng: np.random.Generator) -> Array:
    """Values as the type is stored: [.., bytes of a row] for block types."""
    if kind.numpy is not None:
        return values.astype(kind.numpy)
    if kind.name in ENCODABLE:
        return encode_rows(kind, np.ascontiguousarray(values, dtype=np.float32))
    # Any bytes are blocks; those below 0x7B keep their f16 scales finite.
    return rng.integers(0, 0x7B, (*values.shape[:-1], kind.row_bytes(values.shape[-1])), np.uint8)


def _decoded(kind: DType, stored: Array) -> Array:
    if kind.kind == "int":
        return stored.astype(np.int64)
    return (stored if kind.numpy is not None else decode_rows(kind, stored)).astype(np.float64)


# -- graphs -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Built:
    """A case as a graph.

    node     the result;  sources: what it was made of;  values: of each, for the oracle
    inputs   arrays for the inputs;  states: first contents of the states
    """

    node: Node
    sources: list[Node | None]
    values: list[Array | None]
    inputs: dict[str, Array]
    states: dict[str, Array]


def build(case: Case) -> Built:
    """The graph of a case, and its values: the same at every call."""
    rng = np.random.default_rng(crc32(str(case).encode()))
    op: Any = getattr(ops, case.op)
    writes = getattr(op, "writes", None)
    made = Built(None, [], [], {}, {})  # type: ignore[arg-type]
    for number, source in enumerate(case.sources):
        if source is None:
            node, value = None, None
        elif source.of is not None:
            node, value = _view_of(made, source)
        else:
            node, value = _leaf(made, source, f"s{number}", number == writes, rng)
        made.sources.append(node)
        made.values.append(value)
    made.node = op(*made.sources, **case.attrs)
    return made


def _view_of(made: Built, source: Source) -> tuple[Node, Array]:
    assert source.of is not None
    whole, values = made.sources[source.of], made.values[source.of]
    assert whole is not None and values is not None
    start = (source.start, 0, 0, 0)
    part = values[..., source.start : source.start + source.ne[0]]
    return ops.view(whole, ne=source.ne, start=start), part


def _leaf(
    made: Built, source: Source, name: str, state: bool, rng: np.random.Generator
) -> tuple[Node, Array]:
    """A leaf that holds the source in its layout, and the node that looks at it there."""
    kind, ne = dtype(source.type), (*source.ne, 1, 1, 1)[:4]
    stored = _stored(kind, _numbers(rng, ne[::-1], source.fill), rng)
    view: dict[str, Any] = {}
    memory = stored
    if source.layout.startswith("p"):
        axes = tuple(int(a) for a in source.layout[1:])
        memory = np.ascontiguousarray(stored.transpose([3 - axes[3 - i] for i in range(4)]))
        ne = tuple(ne[axis] for axis in axes)
    elif source.layout:
        before, after, step = _LAYOUTS[source.layout]
        view = {"ne": ne, "start": (before[0] * kind.block, *before[1:]), "step": step}
        block = stored.shape[-1] // (ne[0] // kind.block)  # stored elements of a block
        sizes = [b + n * s + a for b, n, s, a in zip(before, ne, step, after)]
        ne = (sizes[0] + (before[0] + after[0]) * (kind.block - 1), *sizes[1:])
        poison = _POISON[kind.kind] if kind.name != "bf16" else 0xFFFF
        memory = np.full((*ne[:0:-1], ne[0] // kind.block * block), poison, stored.dtype)
        place = [slice(b, b + n * s, s) for b, n, s in zip(before, stored.shape[::-1], step)]
        place[0] = slice(before[0] * block, before[0] * block + stored.shape[-1])
        memory[tuple(place[::-1])] = stored
    maker, held = (ops.state, made.states) if state else (ops.input, made.inputs)
    held[name] = memory
    node = maker(name, kind, ne=ne)
    if source.layout.startswith("p"):
        node = ops.permute(node, axes=axes)
    return ops.view(node, **view) if view else node, _decoded(kind, stored)


def check(case: Case, backend: str = "numpy") -> tolerance.Comparison:
    """Run a case through a plan on a backend and compare with the oracle."""
    built = build(case)
    store = Store(backend)
    plan = compile({"y": built.node}, store=store, backends=[backend]).bind()
    for name, array in built.states.items():
        store.write(name, array)
    got = plan.run(built.inputs)["y"]
    kind = built.node.dtype
    want = oracle.run(case.op, built.values, **case.attrs)
    values = _decoded(kind, got)
    return tolerance.compare(values.reshape(want.shape), want, case.bound(built.node))
