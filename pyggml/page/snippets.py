"""Plans, memory and profiles as HTML for notebooks: without a script, so any viewer shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Protocol

from pyggml.page.layers import Section
from pyggml.page.names import Texts
from pyggml.page.tables import Tables
from pyggml.runtime.memory import Memory, mib
from pyggml.runtime.report import text_of
from pyggml.words import counted

if TYPE_CHECKING:
    from pyggml.runtime.plan import Plan


class Row(Protocol):
    """The time and cost of a step."""

    @property
    def text(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def flops(self) -> float: ...
    @property
    def nbytes(self) -> float: ...


#: Steps of a layer that a notebook shows, and rows of a profile.
STEPS, SLOWEST = 200, 12


def memory_html(memory: Memory) -> str:
    """The table of `print(memory)`, and the lines below it."""
    heads, *rows = (line.split(" | ") for line in _table_lines(memory))
    notes = str(memory).splitlines()[1 + len(rows) :]
    return _table(heads, rows) + "".join(f"<div>{escape(note)}</div>" for note in notes)


def plan_html(plan: Plan) -> str:
    """The memory, and the steps by layer; layers that are alike once."""
    tables = Tables(plan._work, Texts())
    parts = [f"<div>{escape(repr(plan))}</div>", memory_html(plan.memory)]
    for section in tables.sections():
        parts.append(f"<details><summary>{escape(_title(section))}</summary>")
        steps = section.steps[0]
        parts.append(
            _table(
                ("step", "result", "type and ne", "place", "kernels", "MiB"),
                (_step_cells(tables, i) for i in steps[:STEPS]),
            )
        )
        if len(steps) > STEPS:
            parts.append(f"<div>and {counted(len(steps) - STEPS, 'more step')}</div>")
        parts.append("</details>")
    return "".join(parts)


def profile_html(rows: Sequence[Row]) -> str:
    """The times of steps: sums by op, and the slowest steps."""
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        by_op.setdefault(row.op, []).append(row)
    sums = [(f"{op}, {counted(len(same), 'step')}", same) for op, same in by_op.items()]
    slowest = sorted(rows, key=lambda row: -row.seconds)[:SLOWEST]
    whole = sum(row.seconds for row in rows)
    ops = _times(sorted(sums, key=lambda part: -sum(r.seconds for r in part[1])), whole)
    steps = _times([(row.text, [row]) for row in slowest], whole)
    total = f"{counted(len(rows), 'step')}, {whole * 1e3:.3f} ms"
    slow = f"<details open><summary>The slowest steps</summary>{steps}</details>"
    return f"<div>{total}</div>{ops}{slow}"


def _times(parts: Iterable[tuple[str, Sequence[Row]]], whole: float) -> str:
    """A row for each part: its name and its steps."""
    cells = []
    for name, rows in parts:
        seconds, flops, nbytes = (
            sum(getattr(row, key) for row in rows) for key in ("seconds", "flops", "nbytes")
        )
        time, share = max(seconds, 1e-9), 100 * seconds / max(whole, 1e-9)
        numbers = (seconds * 1e3, share, flops / time / 1e9, nbytes / time / 1e9)
        cells.append([name, *(f"{number:.2f}" for number in numbers)])
    return _table(("", "ms", "%", "GFLOP/s", "GB/s"), cells)


def _table_lines(memory: Memory) -> list[str]:
    return [line for line in str(memory).splitlines() if " | " in line]


def _title(section: Section) -> str:
    n, steps = len(section.layers), counted(len(section.steps[0]), "step")
    if n > 1:
        return f"layers {', '.join(map(str, section.layers))}: {n} times {steps}"
    return f"{f'layer {section.layers[0]}' if n else section.name}: {steps}"


def _step_cells(tables: Tables, i: int) -> list[str]:
    step = tables.steps[i]
    place = tables.work.home(step.node).place
    kernels = "; ".join(tables.kernels[i])
    return [str(i), text_of(step), str(step.node.spec), place, kernels, mib(step.nbytes)]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; notebooks have a style for it."""
    head = "".join(f"<th>{escape(text.strip())}</th>" for text in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell.strip())}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
