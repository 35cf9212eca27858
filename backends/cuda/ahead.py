"""Weights of the host that a GPU reads while it computes: on a stream of their own.

The plan says where each load begins and keeps its memory free from there (passes/ahead.py). The
load waits for all that comes before it in the device's stream, and the first step that reads the
weight waits for the load. Both waits are events, which become edges if the steps are captured. An
event serves both: a wait is for its last record.

Launches of the device's stream beside these events wait for all of their predecessor, because which
edges of a graph let a launch start early was not checked for more than one predecessor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.launch import Launch, Record
from pyggml.backends.step import LoadStep, Step
from pyggml.node import Node

Action = Callable[[], None]


class Ahead:
    """The loads of a runner's steps that begin early; each has an event.

    readers  first step that reads some of these weights -> the weights
    """

    def __init__(self, context: Context, steps: Sequence[Step]) -> None:
        self._context = context
        self.events: dict[Node, Any] = {}
        self.readers: dict[Step, list[Node]] = {}
        self._behind: set[Step] = set()  # steps right behind loads that go on beside them
        waiting: set[Node] = set()
        begun = False
        for step in steps:
            if isinstance(step, LoadStep):
                if step.ahead:
                    flags = context.driver.event_flags.DISABLE_TIMING
                    self.events[step.node] = context.driver.Event(flags)
                    waiting.add(step.node)
                    begun = True
                continue
            if begun:
                self._behind.add(step)
                begun = False
            if arriving := waiting & {read.base for read in step.reads}:
                self.readers[step] = [node for node in self.events if node in arriving]
                waiting -= arriving

    def load(self, step: Step, actions: Sequence[Callable[[Any], None]]) -> list[Action]:
        """What queues the load of a weight on the other stream."""
        own, other, event = self._context.stream, self._context.loads, self.events[step.node]
        queued = [partial(action, other) for action in actions]
        begin = [partial(event.record, own), partial(other.wait_for_event, event)]
        return [*begin, *queued, partial(event.record, other)]

    def before(self, step: Step) -> list[Action]:
        """What a step waits for."""
        stream = self._context.stream
        return [
            partial(stream.wait_for_event, self.events[node]) for node in self.readers.get(step, ())
        ]

    def complete(self, step: Step, records: Sequence[Record]) -> list[Record]:
        """The records of a step; the first launch does not overlap with its predecessor if one of
        the events is right before it."""
        beside = step in self.readers or step in self._behind
        if not (beside and records and isinstance(records[0], Launch)):
            return list(records)
        return [replace(records[0], overlap=False), *records[1:]]
