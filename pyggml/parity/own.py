"""Random cases for the ops that a user's file defines."""

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
from pyggml.operation import Op
from pyggml.parity import case
from pyggml.parity.fuzz_draw import Draw


@contextmanager
def own_ops(file: str) -> Iterator[dict[str, object]]:
    """Make the ops of a file known to cases inside the context; yields the file's globals."""
    if not file.endswith(".py") or not Path(file).is_file():
        raise UnknownNameError(f"--ops {file!r}: expected an existing .py file")
    try:
        names = runpy.run_path(file)
    except Exception as error:
        raise PyggmlError(f"--ops: {file} raised {type(error).__name__}: {error}") from error
    library = set(map(id, vars(ops).values()))
    own = {op.name: op for op in names.values() if isinstance(op, Op) and id(op) not in library}
    if not own:
        raise GraphError(f"--ops: {file} defines no op")
    case.OWN.update(own)
    try:
        yield names
    finally:
        for name in own:
            case.OWN.pop(name, None)


#: Cases of each op, and how many draws of sources an op gets to fill them.
COUNT, TRIES = 60, 4000
_NUMBERS = {"float": (0.5, 1.0, 2.0, -0.3), "int": (1, 2, 3, 4), "bool": (True, False)}


def own_cases(file: str, only: str | None = None, seed: int = 0) -> list[str]:
    """Random cases of the ops of a file: sizes and types that their rules accept, any layouts.

    If no random sizes fit an op, the file can list some: `CASES = ["my_op(f32[64,5], beta=0.5)"]`.
    Then these cases run as they are and in other layouts.
    """
    texts: list[str] = []
    with own_ops(file) as names:
        examples = [case.Case.parse(str(text)) for text in _listed(names.get("CASES", ()))]
        for name, op in sorted(case.OWN.items()):
            if only and name not in only.split(","):
                continue
            if op.meaning is None:
                raise GraphError(f"--ops: {name} has no meaning to compare with: add @{name}.means")
            draw = Draw(Random(f"{seed}:{name}"))
            own = [example for example in examples if example.op == name]
            drawn = _varied(own, draw) if own else _guessed(name, op, draw)
            if not drawn:
                raise GraphError(
                    f"--ops: no random sources fit {name}; list some in the file: "
                    f"CASES = ['{name}(f32[64,5])']"
                )
            texts += [str(replace(c, means=means)) for c in drawn for means in (False, True)]
    return list(dict.fromkeys(texts))


def _listed(cases: object) -> list[object]:
    return list(cases) if isinstance(cases, (list, tuple)) else [cases]


def _varied(cases: list[case.Case], draw: Draw) -> list[case.Case]:
    """The cases as they are, and in other layouts."""
    varied = list(cases)
    while len(varied) < COUNT:
        example = draw.pick(cases)
        sources = [
            s and replace(s, weight=draw.chance(0.2), layout=draw.layout(s.type, draw.chance(0.5)))
            for s in example.sources
        ]
        variant = replace(example, sources=tuple(sources))
        if _is_valid(variant) or draw.chance(0.02):  # ends even if no layout is valid
            varied.append(variant)
    return [variant for variant in varied if _is_valid(variant)]


def _guessed(name: str, op: Any, draw: Draw) -> list[case.Case]:
    """Cases of the op, by trial and error: sources like the first one, rows of it, ids."""
    guesses: list[case.Case] = []
    parameters = list(inspect.signature(op).parameters.values())
    for _ in range(TRIES):
        if len(guesses) == COUNT:
            break
        ne = draw.ne(most=2000, rank=draw.pick((1, 2, 3, 4)))
        dtype = draw.pick(("f32", "f32", "f16"))
        sources: list[case.Source | None] = []
        attrs: dict[str, Any] = {}
        for p in parameters:
            if p.kind is p.POSITIONAL_OR_KEYWORD:
                other = draw.pick((ne, ne, ne[:1], (1,), (1, *ne[1:]), ne[1:] or (1,)))
                shape = other if sources else ne
                ids = sources and draw.chance(0.15)
                source = draw.ids(shape, 4) if ids else draw.source(dtype, shape)
                sources.append(None if p.default is None and draw.chance(0.5) else source)
            elif p.default is p.empty or draw.chance(0.5):
                word = str(p.annotation).removesuffix(" | None")
                attrs[p.name] = draw.pick(_NUMBERS.get(word, (p.default,)))
        guess = draw.case(name, *sources, **attrs)
        if _is_valid(guess):
            guesses.append(guess)
    return guesses


def _is_valid(guess: case.Case) -> bool:
    """Whether the op's rule and its meaning accept the case."""
    try:
        case.build(replace(guess, means=case.op_of(guess.op).meaning is not None), values=False)
    except PyggmlError:
        return False
    return True
