"""Ops of a user's own, from a file, for the time of a test."""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from pyggml import ops
from pyggml.errors import GraphError, PyggmlError, UnknownNameError
from pyggml.node import Op
from pyggml.parity import case
from pyggml.parity.fuzz_draw import Draw


@contextmanager
def own_ops(file: str) -> Iterator[dict[str, object]]:
    """Inside, cases may name the ops that a file defines."""
    if not file.endswith(".py") or not Path(file).is_file():
        raise UnknownNameError(f"--ops {file!r}: it takes a Python file that is there")
    try:
        space = runpy.run_path(file)
    except Exception as error:
        raise PyggmlError(f"--ops: {file} raised {type(error).__name__}: {error}") from error
    known = set(map(id, vars(ops).values()))
    mine = {op.name: op for op in space.values() if isinstance(op, Op) and id(op) not in known}
    if not mine:
        raise GraphError(f"--ops: {file} defines no op")
    case.OWN.update(mine)
    try:
        yield space
    finally:
        for name in mine:
            case.OWN.pop(name, None)


#: Cases of each op, and how often sources are drawn before an op is given up.
COUNT, TRIES = 60, 4000
_NUMBERS = {"float": (0.5, 1.0, 2.0, -0.3), "int": (1, 2, 3, 4), "bool": (True, False)}


def own_cases(file: str, only: str | None = None, seed: int = 0) -> list[str]:
    """Random cases of the ops of a file: sizes and types that their rules take, any layouts.

    A file may give sizes that guessing does not find, as `CASES = ["my_op(f32[64,5], beta=0.5)"]`:
    then these cases are run as they are and in other layouts.
    """
    found: list[str] = []
    with own_ops(file) as space:
        given = [case.Case.parse(str(text)) for text in _listed(space.get("CASES", ()))]
        for name, op in sorted(case.OWN.items()):
            if only and name not in only.split(","):
                continue
            if op.meaning is None:
                raise GraphError(f"--ops: {name} has no meaning to compare with: add @{name}.means")
            draw = Draw(Random(f"{seed}:{name}"))
            mine = [one for one in given if one.op == name]
            some = _varied(mine, draw) if mine else _guessed(name, op, draw)
            if not some:
                raise GraphError(
                    f"--ops: no random sources fit {name}; give some: CASES = ['{name}(f32[64,5])']"
                )
            found += [str(replace(one, means=means)) for one in some for means in (False, True)]
    return list(dict.fromkeys(found))


def _listed(cases: object) -> list[object]:
    return list(cases) if isinstance(cases, (list, tuple)) else [cases]


def _varied(cases: list[case.Case], draw: Draw) -> list[case.Case]:
    """The cases, and each with its sources elsewhere in memory."""
    found = list(cases)
    while len(found) < COUNT:
        one = draw.pick(cases)
        sources = [
            s and replace(s, weight=draw.chance(0.2), layout=draw.layout(s.type, draw.chance(0.5)))
            for s in one.sources
        ]
        changed = replace(one, sources=tuple(sources))
        if _stands(changed) or draw.chance(0.02):
            found.append(changed)
    return [one for one in found if _stands(one)]


def _guessed(name: str, op: Any, draw: Draw) -> list[case.Case]:
    """Cases of the op by trial: sources like the first one, rows of it, ids."""
    found: list[case.Case] = []
    parameters = list(inspect.signature(op).parameters.values())
    for _ in range(TRIES):
        if len(found) == COUNT:
            break
        ne = draw.ne(most=2000, rank=draw.pick((1, 2, 3, 4)))
        kind = draw.pick(("f32", "f32", "f16"))
        sources: list[case.Source | None] = []
        attrs: dict[str, Any] = {}
        for p in parameters:
            if p.kind is p.POSITIONAL_OR_KEYWORD:
                like = draw.pick((ne, ne, ne[:1], (1,), (1, *ne[1:]), ne[1:] or (1,)))
                shape = ne if not sources else like
                ids = sources and draw.chance(0.15)
                source = draw.ids(shape, 4) if ids else draw.source(kind, shape)
                sources.append(None if p.default is None and draw.chance(0.5) else source)
            elif p.default is p.empty or draw.chance(0.5):
                word = str(p.annotation).removesuffix(" | None")
                attrs[p.name] = draw.pick(_NUMBERS.get(word, (p.default,)))
        one = draw.case(name, *sources, **attrs)
        if _stands(one):
            found.append(one)
    return found


def _stands(one: case.Case) -> bool:
    """Whether the op's rule, and its meaning, take the case."""
    try:
        case.build(replace(one, means=case.op_of(one.op).meaning is not None), values=False)
    except PyggmlError:
        return False
    return True
