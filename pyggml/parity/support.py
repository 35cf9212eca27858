"""docs/ops.md: the ops and types that each backend runs, from the outcomes of cases."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence

from pyggml import ops
from pyggml.dtypes import TYPES
from pyggml.parity.case import Case
from pyggml.parity.cases import BLOCKS, has_meaning
from pyggml.parity.running import Outcome

_HEAD = """# Ops and types

The ops for which each backend has kernels, by the cases of `pyggml parity`. Made by
`pyggml parity --mode support --markdown > docs/ops.md`.

An op marked * has a meaning in simpler ops, which run on a backend that has no kernel for it.
"""


def table(cases: Sequence[Case], outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """The document: a row for each op, a column for each backend, refusals below."""
    # Meanings are left out: the ops in them have rows.
    rows = {
        name: [(c, o) for c, o in zip(cases, column) if not c.means]
        for name, column in outcomes.items()
    }
    lines = [_HEAD, _row(["op", *rows]), _row(["---"] * (1 + len(rows)))]
    for op in sorted({case.op for case in cases}):
        able = [[c for c, o in row if c.op == op and o.status == "ok"] for row in rows.values()]
        mark = "*" if has_meaning(op) else ""
        lines.append(_row([f"`{op}`{mark}", *(_types(op, column) for column in able)]))
    for name, row in rows.items():
        reasons = sorted({o.why for _, o in row if o.status == "unsupported"})
        lines += ["", f"## Refused by {name}", ""] if reasons else []
        lines += [f"- {reason}" for reason in reasons]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _types(op: str, cases: Sequence[Case]) -> str:
    """`a: f32 f16; b: f32`: the types of each argument in these cases."""
    arguments = []
    for at, parameter in enumerate(inspect.signature(getattr(ops, op)).parameters.values()):
        if parameter.kind is parameter.KEYWORD_ONLY:
            break
        end = None if parameter.kind is parameter.VAR_POSITIONAL else at + 1
        seen = {s.type for c in cases for s in c.sources[at:end] if s is not None}
        if seen:
            arguments.append(f"{parameter.name}: {_listed(seen)}")
    if op in ("cast", "mul_mat"):
        arguments.append(f"dtype: {_listed({str(c.attrs.get('dtype', 'f32')) for c in cases})}")
    return "; ".join(arguments) if arguments else "no"


def _listed(types: set[str]) -> str:
    """Types in the table's order; "every block type but .." if only a few are missing."""
    blocks = set(BLOCKS.split("|"))
    missing = [name for name in TYPES if name in blocks - types]
    if 2 * len(missing) > len(blocks):
        return " ".join(name for name in TYPES if name in types)
    every = f"every block type{' but ' * bool(missing)}{' '.join(missing)}"
    return " ".join([*(name for name in TYPES if name in types - blocks), every])
