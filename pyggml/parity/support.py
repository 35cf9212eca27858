"""docs/ops.md: which ops and types every backend runs, from the cases it was asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence

from pyggml import ops
from pyggml.dtypes import TYPES
from pyggml.parity.case import Case
from pyggml.parity.cases import BLOCKS, has_meaning
from pyggml.parity.running import Outcome

_HEAD = """# Ops and types

What each backend runs with a kernel of its own, by the cases of `pyggml parity`. Made by
`pyggml parity --mode support --markdown > docs/ops.md`.

An op marked * has a meaning in simpler ops: where a backend lacks it, they run in its place.
"""


def table(cases: Sequence[Case], found: Mapping[str, Sequence[Outcome]]) -> str:
    """The document: a row for each op, a column for each backend, refusals below."""
    # What an op's meaning takes is said by the ops in it.
    rows = {n: [(c, o) for c, o in zip(cases, some) if not c.means] for n, some in found.items()}
    lines = [_HEAD, _row(["op", *rows]), _row(["---"] * (1 + len(rows)))]
    for op in sorted({case.op for case in cases}):
        mine = [[c for c, o in some if c.op == op and o.status == "ok"] for some in rows.values()]
        mark = "*" if has_meaning(op) else ""
        lines.append(_row([f"`{op}`{mark}", *(_types(op, some) for some in mine)]))
    for name, some in rows.items():
        reasons = sorted({o.why for _, o in some if o.status == "unsupported"})
        lines += ["", f"## Refused by {name}", ""] if reasons else []
        lines += [f"- {reason}" for reason in reasons]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _types(op: str, cases: Sequence[Case]) -> str:
    """`a f32 f16; b f32`: the types of each argument in these cases."""
    told = []
    for at, name in enumerate(inspect.signature(getattr(ops, op)).parameters):
        seen = {s.type for c in cases for s in c.sources[at : at + 1] if s is not None}
        if seen:
            told.append(f"{name}: {_listed(seen)}")
    if op in ("cast", "mul_mat"):
        told.append(f"dtype: {_listed({str(c.attrs.get('dtype', 'f32')) for c in cases})}")
    return "; ".join(told) if told else "no"


def _listed(types: set[str]) -> str:
    """Types in the table's order; of many block types, only the few that are not among them."""
    blocks = set(BLOCKS.split("|"))
    missing = [name for name in TYPES if name in blocks - types]
    if 2 * len(missing) > len(blocks):
        return " ".join(name for name in TYPES if name in types)
    every = f"every block type{' but ' * bool(missing)}{' '.join(missing)}"
    return " ".join([*(name for name in TYPES if name in types - blocks), every])
