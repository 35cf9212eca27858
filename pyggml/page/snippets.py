"""Plans, memory and profiles as HTML for notebooks: without a script, so any viewer shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from pyggml.page.layers import Section
from pyggml.page.names import Texts
from pyggml.page.tables import Tables
from pyggml.runtime.memory import Memory, mib
from pyggml.runtime.report import Profile, Timing, text_of
from pyggml.words import counted

if TYPE_CHECKING:
    from pyggml.runtime.plan import Plan

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


def profile_html(profile: Profile) -> str:
    """Sums by op, and the slowest steps."""
    slowest = sorted(profile.rows, key=lambda row: -row.seconds)[:SLOWEST]
    heads = ("", "ms", "%", "GFLOP/s", "GB/s")

    def cells(rows: Iterable[Timing]) -> Iterable[list[str]]:
        for row in rows:
            time = max(row.seconds, 1e-9)
            share = 100 * row.seconds / max(profile.seconds, 1e-9)
            numbers = (row.seconds * 1e3, share, row.flops / time / 1e9, row.nbytes / time / 1e9)
            yield [row.text, *(f"{number:.2f}" for number in numbers)]

    total = f"{counted(len(profile.rows), 'step')}, {profile.seconds * 1e3:.3f} ms"
    ops, steps = _table(heads, cells(profile.by_op())), _table(heads, cells(slowest))
    slow = f"<details open><summary>The slowest steps</summary>{steps}</details>"
    return f"<div>{total}</div>{ops}{slow}"


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
