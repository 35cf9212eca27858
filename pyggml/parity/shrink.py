"""Makes a failing case smaller while it fails in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

from pyggml.dtypes import TYPES
from pyggml.errors import PyggmlError
from pyggml.parity.case import Case, Source
from pyggml.parity.graph_case import Builder, GraphCase, PlanText, Statement, is_graph

#: Candidates tried for one failure.
TRIES = 400
#: What may differ between two failures of one kind.
_NUMBERS = re.compile(r"%\w+|\b[a-z]\d+\b|-?\d+(\.\d+)?(e[-+]\d+)?|'[^']*'|<[^>]*>|\[[^\]]*\]")


def way(why: str) -> str:
    """How a case fails, in the first words of its reason and without its numbers."""
    text = _NUMBERS.sub("#", why.partition(";")[0].partition(", built")[0])
    text = re.sub(r"# within #|NMSE # NOT within #|NMSE inf NOT within #", "NMSE", text)
    return re.sub(r"\s+", " ", text).split(" at ")[0][:60]


def shrunk(
    text: str, why: str, run: Callable[[str], str | None], tries: int = TRIES
) -> tuple[str, str]:
    """A smaller text that fails in the same way, and the reason.

    run  the reason for which a text fails, None where it does not
    """
    kind = way(why)
    candidates = _graphs if is_graph(text) else _cases
    seen = {text}
    again = True
    while again and tries > 0:
        again = False
        for candidate in candidates(text):
            if candidate in seen or tries <= 0:
                continue
            seen.add(candidate)
            tries -= 1
            reason = run(candidate)
            if reason is not None and way(reason) == kind:
                text, why, again = candidate, reason, True
                break
    return text, why


# -- a case -----------------------------------------------------------------------------------


def _cases(text: str) -> Iterator[str]:
    """Simpler cases, those that leave out most first. Rules of ops refuse some."""
    case = Case.parse(text)
    for at, source in enumerate(case.sources):
        if source is not None and at:
            yield str(_with(case, at, None))
    for key in case.attrs:
        rest = {k: v for k, v in case.attrs.items() if k != key}
        yield str(replace(case, attrs=rest))
    if case.means:
        yield str(replace(case, means=False))
    yield from _shorter(case)
    for at, source in enumerate(case.sources):
        if source is not None:
            yield from (str(_with(case, at, s)) for s in _plainer(source))


def _with(case: Case, at: int, source: Source | None) -> Case:
    sources = [*case.sources]
    sources[at] = source
    while sources and sources[-1] is None:
        sources.pop()
    return replace(case, sources=tuple(sources))


def _shorter(case: Case) -> Iterator[str]:
    """One size smaller wherever it stands: sizes that are equal belong together."""
    used = sorted({n for s in case.sources if s for n in s.ne if n > 1}, reverse=True)
    for n in used:
        for less in _less(n):
            yield _resized(case, partial(_swapped, n, less, None))
            for axis in range(4):
                yield _resized(case, partial(_swapped, n, less, axis))
    for axis, by in product(range(4), (4, 3, 2)):
        yield _resized(case, partial(_divided, axis, by))
    for at, source in enumerate(case.sources):
        for axis, n in enumerate(source.ne if source else ()):
            for less in _less(n):
                assert source is not None
                ne = tuple(less if i == axis else m for i, m in enumerate(source.ne))
                yield str(_with(case, at, replace(source, ne=ne)))


def _swapped(n: int, less: int, only: int | None, axis: int, m: int) -> int:
    """`less` for the size n (of that dimension only)."""
    return less if m == n and only in (None, axis) else m


def _divided(only: int, by: int, axis: int, m: int) -> int:
    """A size of one dimension divided, where that goes."""
    return m // by if axis == only and m % by == 0 else m


def _less(n: int) -> Iterator[int]:
    some = (1, 2, n // 4, n // 4 | 1, n // 2, n // 2 | 1, n - n % 32, n - 1)
    yield from sorted({m for m in some if 0 < m < n})


def _resized(case: Case, size: Callable[[int, int], int]) -> str:
    """The case with other sizes; sizes among attributes follow."""
    sources = []
    for source in case.sources:
        if source is not None:
            ne = tuple(size(axis, n) for axis, n in enumerate(source.ne))
            source = replace(source, ne=ne, fill=_fitting(source.fill, ne))
        sources.append(source)
    return str(replace(case, sources=tuple(sources)))


def _fitting(fill: str, ne: tuple[int, ...]) -> str:
    """Words that name a row keep to the rows there are."""
    found = re.fullmatch(r"(~past|~upto)(\d+)", fill)
    if found is None:
        return fill
    rows = ne[1] if found[1] == "~past" else ne[0]
    return found[1] + str(max(1, min(int(found[2]), rows - 1)))


def _plainer(source: Source) -> Iterator[Source]:
    """The source with one thing less: layout, fill, outer dimensions of 1, weight, type."""
    if source.layout:
        yield replace(source, layout="")
        for part in re.findall(r"[pbas]\d{4}", source.layout):
            rest = source.layout.replace(part, "")
            yield replace(source, layout=rest)
    if source.weight:
        yield replace(source, weight=False)
    if len(source.ne) > 1 and source.ne[-1] == 1:
        yield replace(source, ne=source.ne[:-1])
    if source.fill.startswith("~"):
        yield replace(source, fill="")
    if source.fill.endswith("-"):
        yield replace(source, fill=source.fill[:-1])
    number = re.fullmatch(r"(~\w+?)(\d+)", source.fill)
    if number and int(number[2]) > 2:
        yield replace(source, fill=f"{number[1]}2")
    if source.type not in ("f32", "i32") and TYPES[source.type].kind != "int":
        yield replace(source, type="f32")


# -- a graph ----------------------------------------------------------------------------------


def _graphs(text: str) -> Iterator[str]:
    """Simpler graphs: fewer plans and outputs, statements left out, smaller leaves."""
    case = GraphCase.parse(text)
    for at in range(len(case.plans)):
        if len(case.plans) > 1:
            yield _valid(replace(case, plans=case.plans[:at] + case.plans[at + 1 :]))
    for at, plan in enumerate(case.plans):
        for less in _plans(plan):
            yield _valid(_planned(case, at, less))
    for at, statement in reversed(list(enumerate(case.statements))):
        for source in statement.args:
            if source:
                yield _valid(_without(case, at, source))
        if not statement.source:
            yield _valid(_as_leaf(case, at))
    for at, statement in enumerate(case.statements):
        if statement.op == "chain":
            for times in _less(statement.attrs["times"]):
                attrs = {**statement.attrs, "times": times}
                yield _valid(_stated(case, at, replace(statement, attrs=attrs)))
    yield from map(_valid, _smaller(case))


def _plans(plan: PlanText) -> Iterator[PlanText]:
    for key in ("pins", "on", "bind", "repeat", "updates", "amb"):
        if key in plan.attrs:
            yield replace(plan, attrs={k: v for k, v in plan.attrs.items() if k != key})
    for write in plan.words("updates"):
        rest = ",".join(w for w in plan.words("updates") if w != write)
        yield replace(plan, attrs={**plan.attrs, "updates": rest})
    for at in range(len(plan.outputs)):
        if len(plan.roots) > 1:
            yield replace(plan, outputs=plan.outputs[:at] + plan.outputs[at + 1 :])


def _planned(case: GraphCase, at: int, plan: PlanText) -> GraphCase:
    return replace(case, plans=(*case.plans[:at], plan, *case.plans[at + 1 :]))


def _stated(case: GraphCase, at: int, statement: Statement) -> GraphCase:
    return replace(case, statements=(*case.statements[:at], statement, *case.statements[at + 1 :]))


def _without(case: GraphCase, at: int, source: str) -> GraphCase:
    """The statement left out, one of its sources in its place."""
    gone = case.statements[at].name

    def instead(name: str | None) -> str | None:
        return source if name == gone else name

    rest = [s for s in case.statements if s.name != gone]
    statements = tuple(replace(s, args=tuple(map(instead, s.args))) for s in rest)
    plans = tuple(
        replace(p, outputs=tuple(dict.fromkeys(str(instead(o)) for o in p.outputs)))
        for p in case.plans
    )
    return GraphCase(statements, plans)


def _as_leaf(case: GraphCase, at: int) -> GraphCase | None:
    """An input where the statement was."""
    statement = case.statements[at]
    builder = Builder()
    try:
        for each in case.statements[: at + 1]:
            builder.add(each)
    except PyggmlError:
        return None
    node = builder.nodes[statement.name]
    if node.dtype.kind == "int" or node.dtype.name not in TYPES:
        return None
    leaf = Statement(statement.name, "", source=Source(node.dtype.name, node.ne))
    return _stated(case, at, leaf)


def _smaller(case: GraphCase) -> Iterator[GraphCase]:
    """A size smaller in every leaf and attribute where it stands."""
    sizes = {n for s in case.statements if s.source for n in s.source.ne if n > 1}
    for n in sorted(sizes, reverse=True):
        for less in _less(n):
            yield _renumbered(case, n, less)


def _renumbered(case: GraphCase, n: int, less: int) -> GraphCase:
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
            fill = re.sub(rf"(?<=[<!]){n}\b", str(less), _fitting(s.source.fill, ne))
            statements.append(replace(s, source=replace(s.source, ne=ne, fill=fill)))
        else:
            keys = ("ne", "n_kv", "n_dims", "k")
            attrs = {k: swap(v) if k in keys else v for k, v in s.attrs.items()}
            statements.append(replace(s, attrs=attrs))
    return replace(case, statements=tuple(statements))


def _valid(case: GraphCase | None) -> str:
    """The graph as text, without what nobody reads; empty where it is none."""
    return "" if case is None else str(case.needed())
