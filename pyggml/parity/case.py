"""A case: one op over described sources, as text and as a graph with values for the oracle."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pyggml import backends, ops
from pyggml.backends.base import Backend
from pyggml.dtypes import DType, dtype
from pyggml.errors import GraphError
from pyggml.graph import Node
from pyggml.parity import guarded, oracle, tolerance
from pyggml.quants import ENCODABLE, decode_rows, encode_rows

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
#: Positions below it keep the usual bound of rope (tolerance.OPS says why).
NEAR = 20000
#: Ops whose results are their sources' values, moved: nothing is computed, nothing may change.
_MOVES = {"reshape", "view", "permute", "transpose", "cont", "concat", "repeat", "get_rows"}


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of a case. Its text: `f16[64,5]`, `i32[6,5]<8-`, `f32[64,5]@wide`, `f16[512,9]=1+64`

    fill    what it holds; nothing: normal values.   <8: ids below 8;  <8-: negative ones too;
            !8: ids below 8, all different in a row;  #9: the number 9;  ~mask: a third -inf, row 1
            all of it;  ~causal: -inf behind the diagonal that ends in the last key;  ~blocks: 30 %
            of blocks of 16 x 8 -inf;  ~above: above 0;  ~one: 0.9 to 1.1;  ~large: thousands;
            ~ties: small whole numbers;  ~wild: inf, NaN, subnormals
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
        layout = found["layout"] or "" if found else ""
        if found is None or not (layout in ("", *_LAYOUTS) or sorted(layout) == list("0123p")):
            raise GraphError(f"{text!r} is no source; a source looks like f16[64,5]@wide")
        ne = tuple(int(n) for n in found["ne"].split(","))
        of = None if found["of"] is None else int(found["of"])
        start = int(found["start"] or 0)
        return Source(found["type"], ne, found["fill"] or "", layout, of, start)


@dataclass(frozen=True, slots=True)
class Case:
    """`op(*sources, **attrs)`; its text is that too: `mul_mat(q4_K[256,16], f32[256,5])`."""

    op: str
    sources: tuple[Source | None, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ["-" if s is None else str(s) for s in self.sources]
        return f"{self.op}({', '.join([*parts, *(f'{k}={v!r}' for k, v in self.attrs.items())])})"

    @property
    def vars(self) -> str:
        """`type_a=q4_K,ne_a=[256,16],type_b=..`: what a pattern can ask for, by argument name."""
        names = inspect.signature(getattr(ops, self.op)).parameters
        told = [
            f"type_{name}={s.type},ne_{name}=[{','.join(map(str, s.ne))}],layout_{name}={s.layout}"
            for name, s in zip(names, self.sources)
            if s is not None
        ]
        return ",".join([*told, *(f"{k}={v}" for k, v in self.attrs.items())])

    @property
    def kind(self) -> tuple[object, ...]:
        """(op, type and layout of each source, type asked for): what a grid has many of."""
        seen = [None if s is None else (s.type, s.layout, s.of, s.start) for s in self.sources]
        return (self.op, *seen, self.attrs.get("type"))

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

    def bound(self, result: Node, numeric: str = "f32") -> float:
        """The NMSE that a backend may have whose numbers in this op are of that class."""
        kind, first = result.dtype, self.sources[1 if self.op == "set_rows" else 0]
        if kind.kind == "int" or self.op in _MOVES:
            return 0.0
        if self.op in ("cast", "cpy", "set_rows"):
            exact = self.op == "cast" and kind.name in ("f32", "f16", "bf16")
            same = first is not None and first.type == kind.name
            return 0.0 if exact or same else tolerance.STORAGE[kind.name]
        far = self.op == "rope_ext" and int(str(self.sources[1]).partition("<")[2] or 0) > NEAR
        own = tolerance.bound(self.op, "far" if far else "f32")
        return max([own, *(tolerance.bound(self.op, c) for c in {numeric, kind.name} - {"f32"})])


def _value(text: str) -> Any:
    try:
        return float(text) if text.lstrip("-") in ("inf", "nan") else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise GraphError(f"{text!r} is no value of an attribute") from None


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
    if fill == "~causal":
        rows, keys = shape[-2:]
        return np.where(np.tri(rows, keys, keys - rows, dtype=bool), 0.0, -np.inf) + 0 * values
    if fill == "~blocks":
        rows, keys = (-(-n // size) for n, size in zip(shape[-2:], (8, 16)))
        hidden = (rng.random((*shape[:-2], rows, keys)) < 0.3).repeat(8, -2).repeat(16, -1)
        return np.where(hidden[..., : shape[-2], : shape[-1]], -np.inf, values)
    if fill == "~above":
        return np.abs(values) + 0.01
    if fill == "~one":
        return rng.uniform(0.9, 1.1, shape)
    if fill == "~large":
        return 1e4 * values
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


def build(case: Case, values: bool = True) -> Built:
    """The graph of a case, and its values: the same at every call; or the graph alone."""
    rng = np.random.default_rng(crc32(str(case).encode()))
    op: Any = getattr(ops, case.op)
    writes = getattr(op, "writes", None)
    made = Built(None, [], [], {}, {})  # type: ignore[arg-type]
    for number, source in enumerate(case.sources):
        node, value = None, None
        if source is not None and source.of is not None:
            node, value = _view_of(made, source)
        elif source is not None:
            kind, ne, name = dtype(source.type), (*source.ne, 1, 1, 1)[:4], f"s{number}"
            node = _leaf(
                kind, ne, source.layout, name, ops.state if number == writes else ops.input
            )
            if values:
                stored = _stored(kind, _numbers(rng, ne[::-1], source.fill), rng)
                held = made.states if number == writes else made.inputs
                held[name] = _in_memory(kind, ne, source.layout, stored)
                value = _decoded(kind, stored)
        made.sources.append(node)
        made.values.append(value)
    made.node = op(*made.sources, **case.attrs)
    return made


def _view_of(made: Built, source: Source) -> tuple[Node, Array | None]:
    found = list(zip(made.sources, made.values))[source.of or 0 :][:1]
    whole, values = found[0] if found else (None, None)
    if whole is None:
        raise GraphError(f"{source} is a view of a source that does not stand before it")
    part = None if values is None else values[..., source.start : source.start + source.ne[0]]
    return ops.view(whole, ne=source.ne, start=(source.start, 0, 0, 0)), part


def _axes(layout: str) -> tuple[int, ...]:
    """Of the layout p0213: (0, 2, 1, 3); of others nothing."""
    return tuple(int(axis) for axis in layout[1:]) if layout[:1] == "p" else ()


def _around(kind: DType, ne: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The size of the memory in which a tensor of `ne` lies."""
    before, after, step = _LAYOUTS[layout]
    edge = [
        (b + a) * (kind.block if axis == 0 else 1) for axis, (b, a) in enumerate(zip(before, after))
    ]
    return tuple(n * s + more for n, s, more in zip(ne, step, edge))


def _leaf(kind: DType, ne: tuple[int, ...], layout: str, name: str, maker: Any) -> Node:
    """The leaf that holds a source in its layout, seen as the source."""
    axes = _axes(layout)
    if axes:
        leaf = maker(name, kind, ne=tuple(ne[axis] for axis in axes))
        return ops.permute(leaf, axes=axes)
    if layout:
        before, _, step = _LAYOUTS[layout]
        start = (before[0] * kind.block, *before[1:])
        return ops.view(
            maker(name, kind, ne=_around(kind, ne, layout)), ne=ne, start=start, step=step
        )
    made: Node = maker(name, kind, ne=ne)
    return made


def _in_memory(kind: DType, ne: tuple[int, ...], layout: str, stored: Array) -> Array:
    """What that leaf holds: `stored` in its place, poison around it."""
    axes = _axes(layout)
    if axes:
        return np.ascontiguousarray(stored.transpose([3 - axes[3 - i] for i in range(4)]))
    if not layout:
        return stored
    before, _, step = _LAYOUTS[layout]
    whole = _around(kind, ne, layout)
    block = stored.shape[-1] // (ne[0] // kind.block)  # stored elements of a block
    poison = _POISON[kind.kind] if kind.name != "bf16" else 0xFFFF
    memory = np.full((*whole[:0:-1], whole[0] // kind.block * block), poison, stored.dtype)
    place = [slice(b, b + n * s, s) for b, n, s in zip(before, stored.shape[::-1], step)]
    place[0] = slice(before[0] * block, before[0] * block + stored.shape[-1])
    memory[tuple(place[::-1])] = stored
    return memory


def check(case: Case, backend: str = "numpy") -> tolerance.Comparison:
    """Run a case on a backend in every way of `guarded.results`; the first that is wrong, else the
    worst within the bound.
    """
    built, device = build(case), backends.get(backend)
    want = oracle.run(case.op, built.values, **case.attrs)
    if built.node.dtype.name == "f16":  # beyond its largest number and half a step is infinity
        want = np.where(np.abs(want) >= 65520, np.copysign(np.inf, want), want)
    bound = case.bound(built.node, numeric_class(device, built.node))
    found: list[tolerance.Comparison] = []
    try:
        for how, got in guarded.results(device, built.node, {**built.inputs, **built.states}):
            values = _decoded(built.node.dtype, got).reshape(want.shape)
            result = tolerance.compare(values, want, bound)
            found.append(replace(result, why=", ".join(filter(None, (result.why, how)))))
            if not result:
                return found[-1]
    except guarded.Violation as broken:
        return tolerance.Comparison(False, float("inf"), bound, why=str(broken))
    return max(found, key=lambda result: result.error)


def numeric_class(device: Backend, node: Node) -> str:
    """What the backend says of its numbers in a node: a class of `tolerance.CLASSES`."""
    declared: Any = getattr(device, "numeric", None)
    return "f32" if declared is None or node.attrs.get("prec") == "f32" else str(declared(node))
