"""Plans, memory and profiles as HTML for notebooks: without a script, so any viewer shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from pyggml.page.names import Texts, lines_of
from pyggml.page.tables import Tables
from pyggml.runtime.layers import Section
from pyggml.runtime.memory import Memory, mib
from pyggml.runtime.report import text_of
from pyggml.words import counted

if TYPE_CHECKING:
    from pyggml.runtime.plan import Plan
    from pyggml.runtime.profile import Profile, Sum, Timing


#: Steps of a layer that a notebook shows, and rows of a profile.
STEPS, SLOWEST = 200, 12


def memory_html(memory: Memory) -> str:
    """The table of `print(memory)`, and the lines below it."""
    heads, *rows = (line.split(" | ") for line in _table_lines(memory))
    notes = str(memory).splitlines()[1 + len(rows) :]
    return _table(heads, rows) + "".join(f"<div>{escape(note)}</div>" for note in notes)


def plan_html(plan: Plan) -> str:
    """The memory, and the steps by layer; layers that are alike once."""
    tables = Tables(plan, Texts())
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


def profile_html(profile: Profile) -> str:
    """The times of steps: sums by op, the slowest steps, and the slow paths."""
    slowest = sorted(profile.rows, key=lambda row: -row.seconds)[:SLOWEST]
    ops = [(f"{row.name}, {counted(row.steps, 'step')}", row) for row in profile.by_op()]
    paths = (f"<div>{escape(line)}</div>" for line in profile.slow_path_lines())
    return (
        f"<div>{escape(profile.head())}</div>{_times(ops, profile.seconds)}{''.join(paths)}"
        "<details open><summary>The slowest steps</summary>"
        f"{_times([(row.text, row) for row in slowest], profile.seconds)}</details>"
    )


def _times(rows: Iterable[tuple[str, Timing | Sum]], whole: float) -> str:
    """A table of named times."""
    cells = []
    for name, row in rows:
        time, share = max(row.seconds, 1e-9), 100 * row.seconds / max(whole, 1e-9)
        numbers = (row.seconds * 1e3, share, row.flops / time / 1e9, row.nbytes / time / 1e9)
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
    kernels = "; ".join(lines_of(tables.kernels[i].names))
    if tables.kernels[i].why:
        kernels += f" (not the fast kernel: {tables.kernels[i].why})"
    return [str(i), text_of(step), str(step.node.spec), place, kernels, mib(step.nbytes)]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; notebooks have a style for it."""
    head = "".join(f"<th>{escape(text.strip())}</th>" for text in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell.strip())}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
