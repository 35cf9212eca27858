"""The lines of plots: speeds of prompts by length or depth, and of generation by depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pyggml.bench.depth import Point
from pyggml.bench.peers import Peer
from pyggml.bench.runs import Row, Test
from pyggml.bench.setting import SHORT

#: The x of a test, or None if it does not belong in a panel.
Place: TypeAlias = Callable[[Test], int | None]
BY_LENGTH, BY_DEPTH = "tokens of the prompt", "tokens in the cache"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a panel.

    points  (x, tokens per second, standard deviation), by x
    peer    whether it is another engine's
    """

    label: str
    points: tuple[tuple[int, float, float], ...]
    peer: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    x_label: str
    lines: tuple[Line, ...]


def title(settings: Sequence[Mapping[str, object]]) -> str:
    """The models and where they ran."""
    models = dict.fromkeys(str(setting["model_type"]) for setting in settings)
    machine = settings[0]["gpu_info"] or settings[0]["cpu_info"]
    places = dict.fromkeys(str(setting["backends"]) for setting in settings)
    return f"{', '.join(models)} on {' and '.join(places)} ({machine})"


def row_panels(rows: Sequence[Row], peers: Sequence[Peer] = ()) -> list[Panel]:
    """The panels of llama-bench's tests. Those with both a prompt and generation are left out.

    Prompts of several lengths are drawn by length, of one length at several depths by depth.
    """
    prompts = [row for row in rows if not row.test.n_gen]
    generated = [row for row in rows if not row.test.n_prompt]
    panels = []
    if prompts:
        lengths = {row.test.n_prompt for row in prompts}
        depths = {row.test.n_depth for row in prompts}
        if len(lengths) == 1 and len(depths) > 1:
            panels.append(_by_depth(lengths, _row_lines(prompts), peers))
        else:
            lines = _row_lines(prompts, by_length=True)
            others = _peer_lines(peers, lambda test: _length(test, min(depths)))
            panels.append(Panel("prompt", BY_LENGTH, (*lines, *others)))
    if generated:
        panels.append(_of_generation(_row_lines(generated), peers))
    return panels


def sweep_panels(points: Sequence[Point], peers: Sequence[Peer] = ()) -> list[Panel]:
    """The panels of a sweep: prompts, and generation, both by depth."""
    label = _labels([point.setting for point in points])
    prompts: dict[str, list[tuple[int, float, float]]] = {}
    generated: dict[str, list[tuple[int, float, float]]] = {}
    for point in points:
        name = label(point.setting)
        prompts.setdefault(name, []).append((point.n_kv, point.speed_pp, 0.0))
        generated.setdefault(name, []).append((point.n_kv, point.speed_tg, 0.0))
    lengths = {point.pp for point in points}
    return [
        _by_depth(lengths, _sorted(prompts), peers),
        _of_generation(_sorted(generated), peers),
    ]


def _by_depth(lengths: set[int], lines: Iterable[Line], peers: Sequence[Peer]) -> Panel:
    def place(test: Test) -> int | None:
        return test.n_depth if not test.n_gen and test.n_prompt in lengths else None

    title = f"prompt of {min(lengths):,} tokens"
    return Panel(title, BY_DEPTH, (*lines, *_peer_lines(peers, place)))


def _of_generation(lines: Iterable[Line], peers: Sequence[Peer]) -> Panel:
    def place(test: Test) -> int | None:
        return None if test.n_prompt else test.n_depth

    return Panel("generation", BY_DEPTH, (*lines, *_peer_lines(peers, place)))


def _length(test: Test, depth: int) -> int | None:
    return test.n_prompt if not test.n_gen and test.n_depth == depth else None


# -- lines ------------------------------------------------------------------------------------


def _row_lines(rows: Sequence[Row], *, by_length: bool = False) -> Iterator[Line]:
    """Lines of the rows with the same label: their setting, and what of the test is not x."""
    label = _labels([row.setting for row in rows])
    depths, sizes = {row.test.n_depth for row in rows}, {row.test.n_gen for row in rows}
    groups: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        test, parts = row.test, [label(row.setting)]
        if by_length and len(depths) > 1:
            parts.append(f"d{test.n_depth}")
        if len(sizes) > 1:
            parts.append(f"tg{test.n_gen}")
        if test.loop:
            parts.append("loop")
        x = test.n_prompt if by_length else test.n_depth
        groups.setdefault(", ".join(parts), []).append((x, row.avg_ts, row.stddev_ts))
    yield from _sorted(groups)


def _labels(settings: Sequence[Mapping[str, object]]) -> Callable[[Mapping[str, object]], str]:
    """A function of a setting: what is different about it."""
    names = [name for name in SHORT if len({str(setting[name]) for setting in settings}) > 1]

    def label(setting: Mapping[str, object]) -> str:
        return ", ".join(["pyggml", *(f"{SHORT[name]} {setting[name]}".strip() for name in names)])

    return label


def _sorted(groups: Mapping[str, list[tuple[int, float, float]]]) -> Iterator[Line]:
    for label, points in groups.items():
        yield Line(label, tuple(sorted(points)))


def _peer_lines(peers: Iterable[Peer], place: Place) -> Iterator[Line]:
    for peer in peers:
        xs = [(place(test), speed) for test, speed in peer.speeds.items()]
        points = sorted((x, speed, 0.0) for x, speed in xs if x is not None)
        if points:
            yield Line(peer.label, tuple(points), peer=True)
