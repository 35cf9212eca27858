"""A graph and its plans: as one line of text, and as nodes with values.

    x=f32[8,5]; s=state(f16[8,32]); i=i32[5]!32; w=set_rows(s, x, i); y=relu(w); plan(y, amb=0.5)

A leaf is a source as in a case (`f32[8,5]@wide`); `@weight` makes it a constant, `state(..)` a
state. An op is `name=op(names, attributes)`; `chain(x, times=500, of='add')` is 500 ops in a row.
The plans share a store. Each is

    plan(outputs.., updates='w', on='null:0,numpy', pins='y=null:1', amb=0.5, repeat=2, bind='x')

on      places the plan may use;  pins: node=place
amb     0: the least possible budget;  1: what the graph needs without a budget
repeat  runs per call
bind    inputs that are bound, so that the plan reads the array itself
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np

from pyggml import ops
from pyggml.dtypes import dtype
from pyggml.errors import GraphError
from pyggml.graph import Graph
from pyggml.node import Node, label
from pyggml.parity.case import Source, arguments, op_of
from pyggml.parity.layouts import in_memory, seen
from pyggml.parity.values import Array, decoded, numbers, stored

#: The ops that a chain repeats: (node so far, x) -> next node.
LINKS: dict[str, Callable[[Node, Node], Node]] = {
    "add": lambda node, first: ops.add(node, first),
    "scale": lambda node, first: ops.scale(node, s=1.0, b=0.001),
    "view": lambda node, first: ops.view(node, ne=node.ne, start=(0, 0, 0, 0)),
    "relu": lambda node, first: ops.relu(ops.scale(node, s=1.0, b=0.001)),
}


#: The attributes of a plan.
PLAN = ("updates", "on", "pins", "amb", "repeat", "bind")


def is_graph(text: str) -> bool:
    """Whether a text is a graph rather than a single case."""
    return ";" in text


@dataclass(frozen=True, slots=True)
class Statement:
    """A leaf or an op.

    op      name of the op; "state" for a state, empty for an input or a constant
    args    names of the sources
    source  of a leaf: its type, size, values and layout
    """

    name: str
    op: str
    args: tuple[str | None, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = None

    def __str__(self) -> str:
        if self.source is not None:
            return f"{self.name}={f'state({self.source})' if self.op else self.source}"
        return f"{self.name}={_call(self.op, self.args, self.attrs)}"


@dataclass(frozen=True, slots=True)
class PlanText:
    """A plan to compile: `plan(..)` of the text."""

    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return _call("plan", self.outputs, self.attrs)

    def words(self, key: str) -> tuple[str, ...]:
        """A list among the attributes: `on='null:0,numpy'`."""
        return tuple(filter(None, str(self.attrs.get(key, "")).split(",")))

    @property
    def roots(self) -> tuple[str, ...]:
        return (*self.outputs, *self.words("updates"))


def _call(op: str, args: Iterable[str | None], attrs: Mapping[str, Any]) -> str:
    parts = [arg or "-" for arg in args] + [f"{key}={value!r}" for key, value in attrs.items()]
    return f"{op}({', '.join(parts)})"


@dataclass(frozen=True, slots=True)
class GraphCase:
    """Statements in topological order, and plans."""

    statements: tuple[Statement, ...]
    plans: tuple[PlanText, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, (*self.statements, *self.plans)))

    @staticmethod
    def parse(text: str) -> GraphCase:
        """The graph that prints as `text`."""
        statements, plans = [], []
        for part in filter(None, (part.strip() for part in text.split(";"))):
            if part.startswith("plan("):
                args, attrs = _arguments(part)
                unknown = [key for key in attrs if key not in PLAN]
                if unknown:
                    known = ", ".join(PLAN)
                    raise GraphError(
                        f"{part}: no attribute {unknown[0]!r}; expected one of {known}"
                    )
                plans.append(PlanText(tuple(filter(None, args)), attrs))
            else:
                statements.append(_statement(part))
        if not plans:
            raise GraphError("the graph has no plan; end its text with plan(names of outputs)")
        return GraphCase(tuple(statements), tuple(plans))

    def pruned(self) -> GraphCase:
        """The graph without statements that no plan reaches."""
        known = {s.name: s for s in self.statements}
        names: set[str] = set()
        stack = [root for plan in self.plans for root in plan.roots]
        while stack:
            key = stack.pop()
            if key not in names and key in known:
                names.add(key)
                stack += [arg for arg in known[key].args if arg]
        statements = tuple(s for s in self.statements if s.name in names)
        return GraphCase(statements, self.plans)


def _arguments(call: str) -> tuple[tuple[str | None, ...], dict[str, Any]]:
    """The names and the attributes of `op(a, -, key=value)`."""
    names, attrs = arguments(call.partition("(")[2].removesuffix(")"))
    return tuple(None if name == "-" else name for name in names), attrs


def _statement(text: str) -> Statement:
    name, equal, value = text.partition("=")
    if not equal or not name.isidentifier():
        raise GraphError(f"{text!r} is not a statement; expected a form such as y=relu(x)")
    state = re.fullmatch(r"state\((.*)\)", value)
    if state or "(" not in value:
        source = Source.parse(state[1] if state else value)
        return Statement(name, "state" if state else "", source=source)
    op = value.partition("(")[0]
    args, attrs = _arguments(value)
    return Statement(name, op, args, attrs)


# -- as nodes ---------------------------------------------------------------------------------


class Builder:
    """Nodes of statements, and the values of their leaves, all by name.

    values  of leaves: float64 or int64, four-dimensional (of states: before the first run)
    inputs, states  the same as arrays in their stored type and layout
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.statements: list[Statement] = []
        self.values: dict[str, Array] = {}
        self.inputs: dict[str, Array] = {}
        self.states: dict[str, Array] = {}

    def add(self, statement: Statement) -> Node:
        node = self._leaf(statement) if statement.source else self._computed(statement)
        self.nodes[statement.name] = node
        self.statements.append(statement)
        return node

    def _computed(self, statement: Statement) -> Node:
        missing = [arg for arg in statement.args if arg and arg not in self.nodes]
        if missing:
            raise GraphError(f"{statement}: no name {missing[0]}")
        if statement.op == "chain":
            return self._chain(statement)
        op = op_of(statement.op)
        src = [self.nodes[arg] if arg else None for arg in statement.args]
        return label(op(*src, **statement.attrs), statement.name)

    def _chain(self, statement: Statement) -> Node:
        assert statement.args[0] is not None
        if statement.attrs.get("of") not in LINKS or "times" not in statement.attrs:
            raise GraphError(
                f"{statement}: expected times=N, of=one of {', '.join(map(repr, LINKS))}"
            )
        node = first = self.nodes[statement.args[0]]
        for _ in range(statement.attrs["times"]):
            node = LINKS[statement.attrs["of"]](node, first)
        return label(node, statement.name)

    def _leaf(self, statement: Statement) -> Node:
        source, name = statement.source, statement.name
        assert source is not None
        rng = np.random.default_rng(crc32(str(statement).encode()))
        type_, ne = dtype(source.type), (*source.ne, 1, 1, 1)[:4]
        array = stored(type_, numbers(rng, ne[::-1], source.fill), rng, source.fill)
        memory = in_memory(type_, ne, source.layout, array)
        self.values[name] = decoded(type_, array)
        if source.weight:
            return seen(
                type_, ne, source.layout, lambda _: ops.constant(memory, dtype=type_, name=name)
            )
        leaf: Any = ops.state if statement.op else ops.input
        (self.states if statement.op else self.inputs)[name] = memory
        return seen(type_, ne, source.layout, lambda size: leaf(name, type_, ne=size))


def built(case: GraphCase) -> Builder:
    """A builder with all nodes of a graph."""
    builder = Builder()
    for statement in case.statements:
        builder.add(statement)
    return builder


def graph_of(builder: Builder, plan: PlanText) -> Graph:
    """The graph that a plan compiles."""
    nodes = builder.nodes
    for key in plan.roots:
        if key not in nodes:
            raise GraphError(f"{plan}: no name {key}")
    return Graph(
        {key: nodes[key] for key in plan.outputs}, [nodes[key] for key in plan.words("updates")]
    )
