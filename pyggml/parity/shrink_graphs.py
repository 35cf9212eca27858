"""Simpler forms of a graph, to shrink a failing one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from pyggml.dtypes import TYPES
from pyggml.errors import PyggmlError
from pyggml.parity.case import Source
from pyggml.parity.graph_case import Builder, GraphCase, PlanText, Statement
from pyggml.parity.shrink_cases import fitting, smaller


def simpler_graphs(text: str) -> Iterator[str]:
    """Texts of simpler graphs: fewer plans, outputs and statements, smaller leaves."""
    case = GraphCase.parse(text)
    for at in range(len(case.plans)):
        if len(case.plans) > 1:
            yield _text(replace(case, plans=case.plans[:at] + case.plans[at + 1 :]))
    for at, plan in enumerate(case.plans):
        for less in _plans(plan):
            yield _text(_with_plan(case, at, less))
    for at, statement in reversed(list(enumerate(case.statements))):
        for source in statement.args:
            if source:
                yield _text(_without(case, at, source))
        if not statement.source:
            yield _text(_as_leaf(case, at))
    for at, statement in enumerate(case.statements):
        if statement.op == "chain":
            for times in smaller(statement.attrs["times"]):
                attrs = {**statement.attrs, "times": times}
                yield _text(_with_statement(case, at, replace(statement, attrs=attrs)))
    yield from map(_text, _resized(case))


def _plans(plan: PlanText) -> Iterator[PlanText]:
    for key in ("pins", "on", "bind", "repeat", "updates", "amb"):
        if key in plan.attrs:
            yield replace(plan, attrs={k: v for k, v in plan.attrs.items() if k != key})
    for write in plan.words("updates"):
        others = ",".join(w for w in plan.words("updates") if w != write)
        yield replace(plan, attrs={**plan.attrs, "updates": others})
    for at in range(len(plan.outputs)):
        if len(plan.roots) > 1:
            yield replace(plan, outputs=plan.outputs[:at] + plan.outputs[at + 1 :])


def _with_plan(case: GraphCase, at: int, plan: PlanText) -> GraphCase:
    return replace(case, plans=(*case.plans[:at], plan, *case.plans[at + 1 :]))


def _with_statement(case: GraphCase, at: int, statement: Statement) -> GraphCase:
    return replace(case, statements=(*case.statements[:at], statement, *case.statements[at + 1 :]))


def _without(case: GraphCase, at: int, source: str) -> GraphCase:
    """The graph without a statement; its readers read `source` instead."""
    dropped = case.statements[at].name

    def instead(name: str | None) -> str | None:
        return source if name == dropped else name

    others = [s for s in case.statements if s.name != dropped]
    statements = tuple(replace(s, args=tuple(map(instead, s.args))) for s in others)
    plans = tuple(
        replace(p, outputs=tuple(dict.fromkeys(str(instead(o)) for o in p.outputs)))
        for p in case.plans
    )
    return GraphCase(statements, plans)


def _as_leaf(case: GraphCase, at: int) -> GraphCase | None:
    """The graph with an input for the statement; None if an input cannot replace it."""
    name, builder = case.statements[at].name, Builder()
    try:
        for statement in case.statements[: at + 1]:
            builder.add(statement)
    except PyggmlError:
        return None
    node = builder.nodes[name]
    if node.dtype.kind == "int" or node.dtype.name not in TYPES:
        return None
    leaf = Statement(name, "", source=Source(node.dtype.name, node.ne))
    return _with_statement(case, at, leaf)


def _resized(case: GraphCase) -> Iterator[GraphCase]:
    """The graph with one size smaller in all leaves and attributes."""
    sizes = {n for s in case.statements if s.source for n in s.source.ne if n > 1}
    for n in sorted(sizes, reverse=True):
        for less in smaller(n):
            yield _with_size(case, n, less)


def _with_size(case: GraphCase, n: int, less: int) -> GraphCase:
    def swap(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(swap, value))
        return (
            less if isinstance(value, int) and not isinstance(value, bool) and value == n else value
        )

    statements = []
    for s in case.statements:
        if s.source is not None:
            ne = tuple(less if m == n else m for m in s.source.ne)
            fill = re.sub(rf"(?<=[<!]){n}\b", str(less), fitting(s.source.fill, ne))
            statements.append(replace(s, source=replace(s.source, ne=ne, fill=fill)))
        else:
            keys = ("ne", "n_kv", "n_dims", "k")
            attrs = {k: swap(v) if k in keys else v for k, v in s.attrs.items()}
            statements.append(replace(s, attrs=attrs))
    return replace(case, statements=tuple(statements))


def _text(case: GraphCase | None) -> str:
    """The graph's text, without unused statements; empty for no graph."""
    return "" if case is None else str(case.pruned())
