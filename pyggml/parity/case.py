"""A case: one op over described sources, as text and as a graph with values for the oracle."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np

from pyggml import ops
from pyggml.dtypes import dtype
from pyggml.errors import GraphError, UnknownNameError
from pyggml.node import Node
from pyggml.parity import tolerance
from pyggml.parity.layouts import Layout, in_memory, seen
from pyggml.parity.meant import meaning_of
from pyggml.parity.values import Array, blank, decoded, numbers, stored

_SOURCE = re.compile(
    r"(?P<type>\w+)\[(?P<ne>[\d,]+)\](?P<fill>[<!]\d+-?|#-?\d+|~\w+)?"
    r"(?P<weight>@weight)?(?:@(?P<layout>\w+))?(?:=(?P<of>\d)\+(?P<start>\d+))?"
)
#: Ops of a user's own, by name, while they are tested.
OWN: dict[str, Any] = {}
#: Ops whose results are their sources' values, moved: nothing is computed, nothing may change.
MOVES = {"reshape", "view", "permute", "transpose", "cont", "concat", "repeat", "get_rows"}


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of a case: `f16[64,5]`, `i32[6,5]<8-`, `q4_0[64,5]@weight@wide`, `f16[512,9]=1+64`

    fill    what it holds; nothing: normal values.   <8: ids below 8;  <8-: negative ones too;
            !8: ids below 8, all different in a row;  !8-: a fourth of them -1;  #9: the number 9;
            ~mask: a third -inf, row 1 all of it;  ~causal: -inf behind the diagonal that ends in
            the last key;  ~blocks: 30 % of blocks of 16 x 8 -inf;  ~above: above 0;  ~one: 0.9 to
            1.1;  ~large: thousands;  ~ties: small whole numbers;
            ~wild: inf, NaN, subnormals; in blocks any bytes;
            ~holed: NaN and infinity in rows 3, 8, 13, ..;  ~ended: in the second half of the rows;
            ~holes: a mask that hides keys 3, 8, 13, .. from all rows but every sixth, and a fifth
            of the other keys;
            ~nan: a tenth NaN;  ~nan5: rows 4, 9, .. are NaN;  ~dead5: those are NaN or infinite;
            ~past7: all rows from 7 on are;  ~hide5, ~upto7: masks that hide the keys of such rows
    weight  whether it is a constant, which a backend may keep in a layout of its own (or a part of
            one, seen through views: `@weight@inner`)
    layout  how it lies in memory, NaN around it.   wide: rows in longer rows;  inner: a part in
            every dimension;  step: every other row;  apart: every other element;  p0213: ggml's
            permute(memory, (0, 2, 1, 3));
            p1032b1000a0100s2111: that of a part of the memory, with elements (blocks) before and
            after it on each dimension, and steps (any of the four may be missing);
            far: its last row (matrix..) begins 2^31 bytes behind the first, with zeros between
    of      it is a view of that other source, `start` elements into each row
    """

    type: str
    ne: tuple[int, ...]
    fill: str = ""
    weight: bool = False
    layout: str = ""
    of: int | None = None
    start: int = 0

    def __str__(self) -> str:
        layout = f"@{self.place}" if self.place else ""
        view = "" if self.of is None else f"={self.of}+{self.start}"
        return f"{self.type}[{','.join(map(str, self.ne))}]{self.fill}{layout}{view}"

    @property
    def place(self) -> str:
        """`wide`, `weight`, `weight@wide`: whether it is a constant, and how it lies in memory."""
        return "@".join(filter(None, ("weight" * self.weight, self.layout)))

    @staticmethod
    def parse(text: str) -> Source | None:
        """The source that prints as `text`; None for an absent one, `-`."""
        if text == "-":
            return None
        found = _SOURCE.fullmatch(text)
        layout = found["layout"] or "" if found else ""
        if found is None or (layout != "far" and Layout.parse(layout) is None):
            raise GraphError(f"{text!r} is no source; a source looks like f16[64,5]@wide")
        ne = tuple(int(n) for n in found["ne"].split(","))
        if layout == "far" and (found["weight"] or not any(n > 1 for n in ne[1:])):
            raise GraphError(f"{text!r} is no source: rows of inputs and states lie @far, no other")
        of = None if found["of"] is None else int(found["of"])
        start = int(found["start"] or 0)
        weight = found["weight"] is not None
        return Source(found["type"], ne, found["fill"] or "", weight, layout, of, start)


@dataclass(frozen=True, slots=True)
class Case:
    """`op(*sources, **attrs)`; its text is that too: `mul_mat(q4_K[256,16], f32[256,5])`.

    means  the op's meaning in simpler ops instead of the op: `glu.means(f32[26,7])`
    """

    op: str
    sources: tuple[Source | None, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    means: bool = False

    def __str__(self) -> str:
        parts = ["-" if s is None else str(s) for s in self.sources]
        parts += [f"{k}={v!r}" for k, v in self.attrs.items()]
        return f"{self.op}{'.means' * self.means}({', '.join(parts)})"

    @property
    def vars(self) -> str:
        """`type_a=q4_K,ne_a=[256,16],type_b=..`: what a pattern can ask for, by argument name."""
        names = inspect.signature(op_of(self.op)).parameters
        told = [
            f"type_{name}={s.type},ne_{name}=[{','.join(map(str, s.ne))}],layout_{name}={s.place}"
            for name, s in zip(names, self.sources)
            if s is not None
        ]
        return ",".join([*told, *(f"{k}={v}" for k, v in self.attrs.items())])

    @property
    def kind(self) -> tuple[object, ...]:
        """(op, type and layout of each source, type asked for): what a grid has many of."""
        told = [None if s is None else (s.type, s.place, s.of, s.start) for s in self.sources]
        return (self.op, *told, self.attrs.get("dtype"))

    @staticmethod
    def parse(text: str) -> Case:
        """The case that prints as `text`."""
        found = re.fullmatch(r"(\w+)(\.means)?\((.*)\)", text)
        if found is None:
            raise GraphError(f"{text!r} is no case; a case looks like relu(f32[64,5])")
        given, attrs = arguments(found[3])
        return Case(found[1], tuple(map(Source.parse, given)), attrs, found[2] is not None)

    def bound(self, result: Node, *numeric: str) -> float:
        """The NMSE that a backend may have whose numbers in this op are of these classes: for a
        meaning, one for each of its parts, whose errors add up.
        """
        kind, first = result.dtype, self.sources[1 if self.op == "set_rows" else 0]
        if kind.kind == "int" or self.op in MOVES:
            return 0.0
        if self.op in ("cast", "cpy", "set_rows"):
            same = first is not None and first.type == kind.name
            return 0.0 if same else tolerance.STORAGE.get(kind.name, 0.0)
        own = tolerance.bound(self.op)
        rounded = tolerance.CLASSES[kind.name] if kind.name in ("f16", "bf16") else 0.0
        parts = sum(tolerance.declared(self.op, c) for c in numeric if c != "f32")
        return max(own, rounded, min(parts, tolerance.LIMITS.get(self.op, tolerance.LIMIT)))


def arguments(text: str) -> tuple[list[str], dict[str, Any]]:
    """What stands between a call's brackets: positional arguments as they are, attributes."""
    given, attrs = [], {}
    for part in re.findall(r"(?:'[^']*'|[^,(\[']|\([^)]*\)|\[[^\]]*\])+", text):
        key, equal, value = part.strip().partition("=")
        if equal and key.isidentifier():
            attrs[key] = _value(value)
        else:
            given.append(part.strip())
    return given, attrs


def op_of(name: str) -> Any:
    """The op of that name: the library's, or one of a file's that is being tested."""
    op = OWN.get(name) or getattr(ops, name, None)
    if op is None:
        raise UnknownNameError(f"there is no op {name!r}")
    return op


def _value(text: str) -> Any:
    try:
        return float(text) if text.lstrip("-") in ("inf", "nan") else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise GraphError(f"{text!r} is no value of an attribute") from None


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
    op = op_of(case.op)
    writes = getattr(op, "writes", None)
    made = Built(None, [], [], {}, {})  # type: ignore[arg-type]
    for number, source in enumerate(case.sources):
        node, value = None, None
        if source is not None and source.of is not None:
            node, value = _view_of(made, source)
        elif source is not None:
            maker = ops.state if number == writes else ops.input
            node, value = _leaf(made, source, f"s{number}", maker, rng if values else None)
        made.sources.append(node)
        made.values.append(value)
    made.node = op(*made.sources, **case.attrs)
    if case.means:
        made.node = meaning_of(made.node)
    return made


def _leaf(
    made: Built, source: Source, name: str, maker: Any, rng: np.random.Generator | None
) -> tuple[Node, Array | None]:
    """The source as its leaf is seen, and its values; what the leaf holds goes into `made`."""
    kind, ne = dtype(source.type), (*source.ne, 1, 1, 1)[:4]
    value = held = None
    if rng is not None:
        array = stored(kind, numbers(rng, ne[::-1], source.fill), rng, source.fill)
        value, held = decoded(kind, array), in_memory(kind, ne, source.layout, array)

    def leaf(size: tuple[int, ...]) -> Node:
        if source.weight:
            data = blank(kind, size) if held is None else held
            return ops.constant(data, dtype=kind, name=name)
        if held is not None:
            (made.states if maker is ops.state else made.inputs)[name] = held
        found: Node = maker(name, kind, ne=size)
        return found

    return seen(kind, ne, source.layout, leaf), value


def _view_of(made: Built, source: Source) -> tuple[Node, Array | None]:
    found = list(zip(made.sources, made.values))[source.of or 0 :][:1]
    whole, values = found[0] if found else (None, None)
    if whole is None:
        raise GraphError(f"{source} is a view of a source that does not stand before it")
    part = None if values is None else values[..., source.start : source.start + source.ne[0]]
    return ops.view(whole, ne=source.ne, start=(source.start, 0, 0, 0)), part
