"""The parity cases of every op, for the tests and for comparing backends.

Each family of the oracle has tables of them, `CASES` and `LARGE`, next to the functions that judge
them. A line is one or more cases in the form of `Case`: `{a|b}` means one line with each word, and
a word in capitals is a list of `WORDS`. Every family has cases with sources that are weights in a
model, constants whole and in part (`@weight`), and with rows, matrices or heads at offsets that
overflow 32 bits (`@far`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from pyggml import ops
from pyggml.dtypes import TYPES
from pyggml.ops.elementwise import BINARY, UNARY
from pyggml.parity.case import Case, build
from pyggml.parity.oracle import FAMILIES
from pyggml.quants import DECODABLE

PLAIN = "f32|f16|bf16"
LEGACY = "q8_0|q4_0|q4_1|q5_0|q5_1|iq4_nl"
#: Every block type that can be decoded.
BLOCKS = "|".join(name for name, t in TYPES.items() if t.kind == "block" and name in DECODABLE)
#: The lists that tables may name.
WORDS = {
    "PLAIN": PLAIN,
    "BLOCKS": BLOCKS,
    "LEGACY": LEGACY,
    # The unary ops that take every number: `log` and `sqrt` have lines of their own.
    "UNARY": "|".join(op.name for op in UNARY if op not in (ops.log, ops.sqrt)),
    "BINARY": "|".join(op.name for op in BINARY),
    "LAYOUTS": "|@wide|@inner|@step|@p0213|@p1032|@p3210",
}


def _expand(line: str, chosen: tuple[str, ...] = ()) -> Iterator[str]:
    """The line with each choice of words; `$n` repeats the word chosen in the n-th braces."""
    match = re.search(r"\{([^{}]*)\}", line)
    if match is None:
        yield re.sub(r"\$(\d)", lambda m: chosen[int(m[1]) - 1], line)
        return
    for word in match[1].split("|"):
        yield from _expand(line[: match.start()] + word + line[match.end() :], (*chosen, word))


def expand(text: str) -> tuple[Case, ...]:
    """The distinct cases of a table, in its order; then those of ops with a meaning once more, by
    their meanings.
    """
    for name, choice in WORDS.items():
        text = text.replace(name, choice)
    texts = dict.fromkeys(case for line in text.split("\n") if line for case in _expand(line))
    plain = tuple(map(Case.parse, texts))
    return plain + tuple(replace(case, means=True) for case in plain if composes(case))


def has_meaning(op: str) -> bool:
    """Whether the op has a meaning in simpler ops (a few names are functions, not ops)."""
    return getattr(getattr(ops, op), "meaning", None) is not None


def composes(case: Case) -> bool:
    """Whether the case's node has a meaning: that of an op may be for some operands only."""
    if not has_meaning(case.op):
        return False
    op = getattr(ops, case.op)
    return op.means_where is None or op.composes(build(case, values=False).node)


@cache
def cases() -> tuple[Case, ...]:
    """Every case of the small grid."""
    return expand("".join(family.CASES for family in FAMILIES))


def large_cases() -> tuple[Case, ...]:
    """A few cases of every op in which a row, a matrix or a list of ids is far larger than 64 KiB.

    Kernels must not allocate temporaries of that size. The oracle would take too long for these.
    """
    large = expand("".join(family.LARGE for family in FAMILIES))
    return tuple(case for case in large if not case.means)
