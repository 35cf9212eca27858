"""What a plan really has in memory, from the addresses of every kernel call, loops included.

Nothing here asks the planner for a size or a lifetime. A tensor is alive from the kernel that
writes it to the last kernel that reads it; a source of a loop, to the loop's last kernel. Its bytes
are those that the kernel got.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from attentions import Leaves, run

import pyggml as gg
from pyggml.backends import host_runner
from pyggml.backends.host_memory import Packed
from pyggml.backends.step import LoopStep
from pyggml.node import Node, labels

Span = tuple[int, int]


@dataclass
class Call:
    """One kernel call: its node, the bytes of its result and its scratch."""

    node: Node
    out: Span
    scratch: Span


@dataclass
class Life:
    """A tensor that call `start` writes and call `end` reads last."""

    start: int
    end: int
    span: Span


def _span(x: Any) -> Span:
    low, high = np.lib.array_utils.byte_bounds(x.raw if isinstance(x, Packed) else x)
    return int(low), int(high)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record the kernel calls of plans that are bound and run inside the context."""
    calls: list[Call] = []
    original = host_runner.kernel_call

    def recording(kernels: Any, step: Any, arrays: Any, memory: Any, attrs: Any) -> Any:
        call = original(kernels, step, arrays, memory, attrs)
        record = Call(step.node, _span(arrays[0]), _span(memory) if memory.size else (0, 0))

        def both() -> None:
            calls.append(record)
            call()

        return both

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_runner, "kernel_call", recording)
        yield calls


def _pieces(plan: gg.Plan) -> dict[Node, Node]:
    """Leaves of loop bodies -> what they are pieces of."""
    return {
        take.piece: source
        for step in plan.steps
        if isinstance(step, LoopStep)
        for body in step.loop.bodies()
        for take in body.takes
        if (source := step.node.src[take.source]) is not None
    }


def _ends(plan: gg.Plan, calls: list[Call]) -> list[int]:
    """The call until which each call needs its sources: the last one of its loop, or itself."""
    loops = [step for step in plan.steps if isinstance(step, LoopStep)]
    loop = {s.node: step for step in loops for body in step.bodies for s in body.steps}
    last = {loop.get(call.node): i for i, call in enumerate(calls)}
    return [last[loop[c.node]] if c.node in loop else i for i, c in enumerate(calls)]


def _lives(plan: gg.Plan, calls: list[Call]) -> tuple[list[Life], list[bool]]:
    """The lives of counted tensors, and whether each call reads or writes one."""
    pieces, ends = _pieces(plan), _ends(plan, calls)

    def root(node: Node) -> tuple[Node, bool]:
        """The tensor behind views and pieces, and whether it comes from outside a loop."""
        outside = False
        while node in pieces or node.op.view is not None:
            outside |= node in pieces
            source = pieces.get(node, node.src[0] if node.src else None)
            assert source is not None
            node = source
        return node, outside

    lives: list[Life] = []
    now: dict[Node, Life] = {}
    touches = []
    for i, call in enumerate(calls):
        seen = [root(s) for s in call.node.src if s is not None]
        read = [(now[node], outside) for node, outside in seen if node in now]
        for life, outside in read:
            life.end = max(life.end, ends[i] if outside else i)
        if "counted" in labels(call.node):
            start = i
            if call.node.op is gg.concat:  # starts when its first part is written into it
                start = min([i, *(r.start for r, _ in read if _inside(r.span, call.out))])
            now[call.node] = Life(start, i, call.out)
            lives.append(now[call.node])
        touches.append(bool(read) or "counted" in labels(call.node))
    return lives, touches


def _inside(a: Span, b: Span) -> bool:
    return b[0] <= a[0] and a[1] <= b[1]


def _union(spans: list[Span]) -> int:
    total, reach = 0, 0
    for low, high in sorted(spans):
        total += max(0, high - max(low, reach))
        reach = max(reach, high)
    return total


def measured_peak(plan: gg.Plan, at: Leaves) -> tuple[int, dict[str, np.ndarray[Any, Any]]]:
    """The most bytes at once of counted tensors and their kernels' scratch, and the outputs."""
    with recorded() as calls:
        out = dict(run(plan, at))
    lives, touches = _lives(plan, calls)
    begins: dict[int, list[Life]] = {}
    for life in lives:
        begins.setdefault(life.start, []).append(life)
    alive: list[Life] = []
    peak = 0
    for i, call in enumerate(calls):
        alive = [life for life in alive if life.end >= i] + begins.get(i, [])
        spans = [life.span for life in alive]
        peak = max(peak, _union([*spans, call.scratch] if touches[i] else spans))
    return peak, out
