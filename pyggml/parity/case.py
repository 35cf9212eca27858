"""A case: one op over sources, as text and as a graph with values for the oracle."""

from __future__ import annotations

import ast
import difflib
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
#: A user's own ops by name, while they are tested.
OWN: dict[str, Any] = {}
_LEAVES = {"constant", "input", "state"}
#: Ops that only move values: nothing may change.
MOVES = {
    *("reshape", "view", "permute", "transpose", "cont", "concat", "repeat", "get_rows"),
    *("all_gather", "broadcast"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of a case: `f16[64,5]`, `i32[6,5]<8-`, `q4_0[64,5]@weight@wide`, `f16[512,9]=1+64`

    fill    its values; by default normally distributed.
            <8: ids below 8;  <8-: some of them negative;
            !8: ids below 8, distinct within a row;  !8-: a fourth of them is -1;  #9: all are 9;
            ~mask: a third is -inf, and all of row 1;
            ~causal: -inf after the diagonal that ends at the last key;
            ~blocks: 30 % of blocks of 16 x 8 are -inf;
            ~level: rows around -3000 to 3000; rows 0, 3, 6, .. are constant;  ~deep: -80 to -10;
            ~above: above 0;  ~one: 0.9 to 1.1;  ~large: thousands;  ~ties: small integers;
            ~wild: inf, NaN and subnormals; for block types any bytes;
            ~holed: NaN and infinity in rows 3, 8, 13, ..;  ~ended: in the second half of the rows;
            ~holes: a mask that hides keys 3, 8, 13, .. from all rows but every sixth, and a fifth
            of the other keys;
            ~nan: a tenth is NaN;  ~nan5: rows 4, 9, .. are NaN;
            ~dead5: rows 4, 9, .. are NaN or infinite;  ~past7: all rows from 7 on are;
            ~hide5, ~upto7: masks that hide the keys of such rows
    weight  true for a constant, which a backend may store in its own layout; `@weight@inner` is a
            part of a constant, seen through a view
    layout  its layout in memory, with NaN around it.
            wide: rows in longer rows;  inner: a part in every dimension;
            step: every other row;  apart: every other element;
            p0213: ggml's permute(memory, (0, 2, 1, 3));
            p1032b1000a0100s2111: a permuted part of the memory, with elements (blocks) before and
            after it on each dimension, and steps; any of the four may be left out;
            far: the last row (or matrix) is 2^31 bytes after the first, with zeros between
    of      number of the source that this one is a view of, `start` elements into each row
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
        """`wide`, `weight`, `weight@wide`: the mark of a constant, and the layout."""
        return "@".join(filter(None, ("weight" * self.weight, self.layout)))

    @staticmethod
    def parse(text: str) -> Source | None:
        """The source with this text; None for `-`, an absent source."""
        if text == "-":
            return None
        match = _SOURCE.fullmatch(text)
        layout = match["layout"] or "" if match else ""
        if match is None or (layout != "far" and Layout.parse(layout) is None):
            raise GraphError(f"{text!r} is not a source; expected a form such as f16[64,5]@wide")
        ne = tuple(int(n) for n in match["ne"].split(","))
        if layout == "far" and (match["weight"] or not any(n > 1 for n in ne[1:])):
            raise GraphError(
                f"{text!r} is not a source: only inputs and states of several rows can be @far"
            )
        of = None if match["of"] is None else int(match["of"])
        start = int(match["start"] or 0)
        weight = match["weight"] is not None
        return Source(match["type"], ne, match["fill"] or "", weight, layout, of, start)


@dataclass(frozen=True, slots=True)
class Case:
    """`op(*sources, **attrs)`, as in its text: `mul_mat(q4_K[256,16], f32[256,5])`.

    means  run the op's meaning in simpler ops instead of the op: `glu.means(f32[26,7])`
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
        """`type_a=q4_K,ne_a=[256,16],type_b=..`: the text that a pattern (-p) is matched with."""
        parameters = inspect.signature(op_of(self.op)).parameters.values()
        names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        names += [f"{names[-1]}{i}" for i in range(1, len(self.sources) - len(names) + 1)]
        sources = [
            f"type_{name}={s.type},ne_{name}=[{','.join(map(str, s.ne))}],layout_{name}={s.place}"
            for name, s in zip(names, self.sources)
            if s is not None
        ]
        return ",".join([*sources, *(f"{k}={v}" for k, v in self.attrs.items())])

    @property
    def kind(self) -> tuple[object, ...]:
        """(op, type and layout of each source, dtype): the same for cases of different sizes."""
        sources = [None if s is None else (s.type, s.place, s.of, s.start) for s in self.sources]
        return (self.op, *sources, self.attrs.get("dtype"))

    @staticmethod
    def parse(text: str) -> Case:
        """The case with this text."""
        match = re.fullmatch(r"(\w+)(\.means)?\((.*)\)", text)
        if match is None:
            raise GraphError(f"{text!r} is not a case; expected a form such as relu(f32[64,5])")
        sources, attrs = arguments(match[3])
        return Case(match[1], tuple(map(Source.parse, sources)), attrs, match[2] is not None)

    def bound(self, result: Node, *numeric: str) -> float:
        """The NMSE allowed for a backend that declares these numeric classes.

        numeric  the op's class; for a meaning the class of each of its ops, whose bounds add up
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
    """(positional arguments, attributes) of the text between a call's parentheses."""
    positional, attrs = [], {}
    for part in re.findall(r"(?:'[^']*'|[^,(\[']|\([^)]*\)|\[[^\]]*\])+", text):
        key, equal, value = part.strip().partition("=")
        if equal and key.isidentifier():
            attrs[key] = _value(value)
        else:
            positional.append(part.strip())
    return positional, attrs


def op_of(name: str) -> Any:
    """The op with this name: one of the file under test, or the library's."""
    names = {*OWN, *ops.ALL, *ops.BUILDERS} - _LEAVES
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownNameError(f"there is no op {name!r}{hint}")
    return OWN.get(name) or getattr(ops, name)


def _value(text: str) -> Any:
    try:
        return float(text) if text.lstrip("-") in ("inf", "nan") else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise GraphError(
            f"{text!r} is not a value for an attribute; expected a Python literal, inf or nan"
        ) from None


# -- graphs -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Built:
    """A case as a graph.

    node     the result
    sources  nodes of the sources;  values: their values for the oracle
    inputs   arrays for the inputs;  states: initial contents of the states
    """

    node: Node
    sources: list[Node | None]
    values: list[Array | None]
    inputs: dict[str, Array]
    states: dict[str, Array]


def build(case: Case, values: bool = True) -> Built:
    """The graph of a case; with `values` also its values, which are the same at every call."""
    rng = np.random.default_rng(crc32(str(case).encode()))
    op = op_of(case.op)
    writes = getattr(op, "writes", None)
    built = Built(None, [], [], {}, {})  # type: ignore[arg-type]
    for number, source in enumerate(case.sources):
        node, value = None, None
        if source is not None and source.of is not None:
            node, value = _view_of(built, source)
        elif source is not None:
            leaf = ops.state if number == writes else ops.input
            node, value = _leaf(built, source, f"s{number}", leaf, rng if values else None)
        built.sources.append(node)
        built.values.append(value)
    built.node = op(*built.sources, **case.attrs)
    if case.means:
        built.node = meaning_of(built.node)
    return built


def _leaf(
    case: Built, source: Source, name: str, op: Any, rng: np.random.Generator | None
) -> tuple[Node, Array | None]:
    """(the source as a view of its leaf, its values); adds the leaf's array to `case`."""
    type_, ne = dtype(source.type), (*source.ne, 1, 1, 1)[:4]
    value = memory = None
    if rng is not None:
        array = stored(type_, numbers(rng, ne[::-1], source.fill), rng, source.fill)
        value, memory = decoded(type_, array), in_memory(type_, ne, source.layout, array)

    def leaf(size: tuple[int, ...]) -> Node:
        if source.weight:
            data = blank(type_, size) if memory is None else memory
            return ops.constant(data, dtype=type_, name=name)
        if memory is not None:
            (case.states if op is ops.state else case.inputs)[name] = memory
        node: Node = op(name, type_, ne=size)
        return node

    return seen(type_, ne, source.layout, leaf), value


def _view_of(case: Built, source: Source) -> tuple[Node, Array | None]:
    earlier = list(zip(case.sources, case.values))[source.of or 0 :][:1]
    whole, values = earlier[0] if earlier else (None, None)
    if whole is None:
        raise GraphError(f"{source} is a view of source {source.of}, which must come before it")
    part = None if values is None else values[..., source.start : source.start + source.ne[0]]
    return ops.view(whole, ne=source.ne, start=(source.start, 0, 0, 0)), part
