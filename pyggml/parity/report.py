"""The result of `gg.compare`: a row for each node, and the table that it prints."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from pyggml.errors import DTypeError, GraphError, UnknownNameError
from pyggml.node import Node, labels, line_of
from pyggml.parity.tolerance import Comparison
from pyggml.runtime import places
from pyggml.words import counted

#: The most rows that the table shows.
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Row:
    """A node, or an output of the whole graph, on two places.

    label       the node's label; with its number in `print(Graph(...))` if others have the same
    status      "ok"; "fail": out of bound, or a kernel raised; "unsupported": a place cannot run
                it; "skipped": a source could not be computed
    why         the reason of a status that is not ok
    comparison  NMSE, bound and worst element, if both places gave a value
    """

    label: str
    node: Node = field(repr=False)
    status: str
    why: str = ""
    comparison: Comparison | None = None

    @property
    def op(self) -> str:
        return self.node.op.name

    @property
    def spec(self) -> str:
        return str(self.node.spec)

    @property
    def line(self) -> str:
        """`file:line` of the code that built the node."""
        return line_of(self.node)

    @property
    def error(self) -> float | None:
        return None if self.comparison is None else self.comparison.error

    @property
    def bound(self) -> float | None:
        return None if self.comparison is None else self.comparison.bound

    @property
    def ratio(self) -> float:
        """Error over bound; a kernel that raised is as wrong as can be."""
        if self.comparison is None:
            return inf if self.status == "fail" else 0.0
        return self.comparison.ratio

    def __str__(self) -> str:
        built = f", built at {self.line}" if self.line else ""
        result = (
            str(self.comparison) if self.comparison is not None else f"{self.status}: {self.why}"
        )
        return f"{self.label} = {self.op} {self.spec}{built}: {result}"

    def as_dict(self) -> dict[str, Any]:
        """The row for JSON; inf and NaN become text."""
        texts = {name: getattr(self, name) for name in ("label", "op", "spec", "line", "status")}
        numbers: dict[str, Any] = {"why": self.why, "error": self.error, "bound": self.bound}
        result = self.comparison
        if result is not None and result.at is not None:
            numbers |= {"at": result.at, "a": result.want, "b": result.got}
        finite = {k: v if not isinstance(v, float) or abs(v) < inf else str(v)
                  for k, v in numbers.items()}  # fmt: skip
        return texts | finite


@dataclass(frozen=True, slots=True)
class Report:
    """The comparison of a graph on places a and b. It is true if `ok`.

    nodes    a row for each node, run alone, in the graph's order
    outputs  rows of the whole graph: its outputs, and the states that it writes
    """

    a: str
    b: str
    nodes: tuple[Row, ...]
    outputs: tuple[Row, ...]
    _script: Callable[[Node, float, Path], None] = field(repr=False)

    @property
    def rows(self) -> tuple[Row, ...]:
        return (*self.nodes, *self.outputs)

    @property
    def ok(self) -> bool:
        """Whether every node and output was compared and is within its bound."""
        return all(row.status == "ok" for row in self.rows)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def first(self) -> Row | None:
        """The first node that failed; if none did, the first output."""
        return next((row for row in self.rows if row.status == "fail"), None)

    @property
    def worst(self) -> Row | None:
        """The row with the largest error relative to its bound: among failing nodes, else among
        failing outputs, else among all nodes.
        """
        failing = [[r for r in rows if r.status == "fail"] for rows in (self.nodes, self.outputs)]
        rows: Sequence[Row] = failing[0] or failing[1] or self.nodes
        return max(rows, key=lambda row: (row.ratio, row.error or 0.0), default=None)

    def __str__(self) -> str:
        if self.first is None or self.first in self.outputs:
            return self.table()
        label = self.first.label
        call = f"report.script({label!r}, {script_name(label)!r})"
        return f"{self.table()}\n{call} writes the first as a program"

    def table(self) -> str:
        """Counts, the rows that are not ok, the first and the worst."""
        lines = [f"{self.a} and {self.b}: {_counts(self.nodes, 'node')}; "
                 f"whole graph: {_counts(self.outputs, 'result')}"]  # fmt: skip
        by_step = any(row.label.startswith("step ") for row in self.outputs)
        if places.parse(self.a) == places.parse(self.b) and not by_step:
            lines.append("the same place twice: this only shows that it is deterministic")
        others = [row for row in self.rows if row.status != "ok"]
        lines += _table(others[:SHOWN])
        lines += [f"  and {len(others) - SHOWN} more"] if len(others) > SHOWN else []
        first, worst = self.first, self.worst
        if first is not None:
            lines.append(f"first{' and worst' * (first is worst)}: {first}")
        if worst is not first and worst is not None and worst.ratio:
            lines.append(f"worst: {worst}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "ok": self.ok,
            "first": self.first and self.first.label,
            "worst": self.worst and self.worst.label,
            "nodes": [row.as_dict() for row in self.nodes],
            "outputs": [row.as_dict() for row in self.outputs],
        }

    def row(self, label: str) -> Row:
        """The row with this label; UnknownNameError unless there is exactly one."""
        node = labelled(label, {row.node: row.label for row in self.nodes})
        return next(row for row in self.nodes if row.node is node)

    def script(self, which: str | Row, path: str | Path) -> Path:
        """Write a program that runs one node on a and b, and its inputs in an .npz file next to it.

        which  a label or a row
        path   path of the program, `NAME.py`

        The program exits with 1 if the node is out of bound. The node's sources are computed again
        here, as for the report.
        """
        row = self.row(which) if isinstance(which, str) else which
        if not isinstance(row, Row) or row not in self.nodes:
            raise DTypeError(f"script takes a node's label or its row, not {which!r}")
        path = script_path(path)
        self._script(row.node, row.bound or 0.0, path)
        return path


def labelled(label: str, names: Mapping[Node, str]) -> Node:
    """The node with this name or label; UnknownNameError unless there is exactly one."""
    nodes = [node for node, name in names.items() if name == label]
    nodes = nodes or [node for node in names if label in labels(node)]
    if len(nodes) == 1:
        return nodes[0]
    if nodes:
        several = ", ".join(names[node] for node in nodes)
        raise UnknownNameError(f"{len(nodes)} nodes are labelled {label!r}; use one of: {several}")
    known = list(dict.fromkeys(t for node, name in names.items() for t in (name, *labels(node))))
    near = difflib.get_close_matches(label, known, 5)
    hint = f"{'the closest labels' if near else 'some'} are {', '.join(near or known[:5])}"
    raise UnknownNameError(f"no node is labelled {label!r}; {hint}")


def script_path(path: str | Path) -> Path:
    """The path of a script; GraphError unless it is a NAME.py in an existing folder."""
    path = Path(path)
    if path.suffix != ".py":
        raise GraphError(
            f"the script must be a NAME.py (its arrays go to NAME.npz), got {str(path)!r}"
        )
    if not path.parent.is_dir():
        raise GraphError(f"the script {path} cannot be written: there is no folder {path.parent}")
    return path


def script_name(label: str) -> str:
    """The default file name of a node's script."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in label) + ".py"


def _counts(rows: Sequence[Row], what: str) -> str:
    """`39/41 nodes within their bounds, 1 fail, 1 unsupported`."""
    counts = Counter(row.status for row in rows)
    others = [f"{n} {status}" for status, n in counts.items() if status != "ok"]
    bounds = "its bound" if len(rows) == 1 else "their bounds"
    good = f"{counts['ok']}/{counted(len(rows), what)} within {bounds}"
    return ", ".join([good, *others])


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [("", "op", "size", "NMSE", "bound", "worst element")] if rows else []
    reasons: set[str] = set()
    for row in rows:
        result, numbers = row.comparison, ("-", "-")
        if result is None:
            worst = f"{row.status}: {'as above' if row.why in reasons else row.why}"
            reasons.add(row.why)
        else:
            numbers = f"{result.error:.2g}", f"{result.bound:.2g}"
            worst = (
                f"{result.at}: {result.got:.9g} for {result.want:.9g}{row.why and f' ({row.why})'}"
            )
        cells.append((row.label, row.op, row.spec, *numbers, worst))
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells]
