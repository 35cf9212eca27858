"""Drawing panels of speeds to a file. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pyggml.bench.panels import Panel
from pyggml.extras import package

_COLOURS = (
    "#0b6e99", "#c4501b", "#2e8b57", "#8a4fa3", "#b8860b", "#b03060", "#4a5f9e", "#6b6b00",
    "#3aa6a6", "#d1698c", "#7a4a2a", "#555555",
)  # fmt: skip
#: From this ratio of the largest to the smallest x on, the axis is logarithmic.
_LOG_RATIO = 8
_MOST_TICKS = 8


def check() -> None:
    """MissingPackageError if matplotlib is not installed."""
    _matplotlib("figure")


def draw(
    panels: Sequence[Panel], path: Path, title: str, y_label: str = "tokens per second"
) -> None:
    """Write the panels side by side; the suffix of the path says in which form.

    A label has the same colour in all panels. Peers' lines are dashed.
    """
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    height = 4.2 + 0.19 * max(len(panel.lines) for panel in panels)  # of legends
    figure = _matplotlib("figure").Figure(figsize=(5.4 * len(panels), height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for line in panel.lines:
            xs, ys, errors = zip(*line.points)
            axes.errorbar(
                xs, ys, yerr=errors if any(errors) else None, label=line.label,
                color=_COLOURS[labels.index(line.label) % len(_COLOURS)],
                marker="s" if line.peer else "o", linestyle="--" if line.peer else "-",
                markersize=4, linewidth=1.2 if line.peer else 1.8, capsize=2,
            )  # fmt: skip
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.x_label)
        axes.set_ylim(
            0, 1.08 * max(y + error for line in panel.lines for _, y, error in line.points)
        )
        _scale(axes, [x for line in panel.lines for x, _, _ in line.points])
        axes.yaxis.set_major_formatter(_plain())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.axes[0].set_ylabel(y_label)
    figure.savefig(path, dpi=150)


def _scale(axes: Any, xs: Sequence[int]) -> None:
    """Few values are the ticks; lengths that grow by factors have a logarithmic axis."""
    ticker = _matplotlib("ticker")
    if min(xs) > 0 and max(xs) >= _LOG_RATIO * min(xs):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    values = sorted(set(xs))
    least = (max(xs) - min(xs)) / _MOST_TICKS  # so that their texts do not touch
    apart = axes.get_xscale() == "log" or all(b - a >= least for a, b in pairwise(values))
    if apart and len(values) <= _MOST_TICKS + 1:
        axes.set_xticks(values)
    else:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(_plain())


def _plain() -> Any:
    return _matplotlib("ticker").FuncFormatter(lambda x, _: f"{x:,.10g}")


def _matplotlib(module: str) -> Any:
    return package(f"matplotlib.{module}", "a plot", "plot")
