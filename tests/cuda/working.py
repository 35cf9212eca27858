"""A fake GPU whose streams run late and whose kernels run as C++; a graph is replayed in any order
that its edges allow."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyggml import backends
from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.launch import Launch
from pyggml.errors import DeviceError
from tests.cuda.conftest import Machine
from tests.cuda.emulated import starter


class Graph:
    """Work that is being captured: each node with those that it waits for."""

    def __init__(self, origin: Any) -> None:
        self.origin = origin
        self.nodes: list[tuple[Callable[[], None], frozenset[int]]] = []
        self.streams: dict[Any, Any] = {}  # in capture -> its real queue

    def enter(self, stream: Any, after: frozenset[int]) -> None:
        self.streams[stream] = stream.queue
        stream.queue = Branch(self, after)

    def end(self) -> Graph:
        last = self.origin.queue.after
        for stream, queue in self.streams.items():
            stream.queue = queue
        if len(last) != len(self.nodes):
            raise DeviceError("a stream is not joined with the one that is captured")
        return self

    def upload(self, stream: Any) -> None:
        assert stream is not None

    def launch(self, stream: Any) -> None:
        self.origin.queue.add(self._run)

    def _run(self) -> None:
        done: set[int] = set()
        while len(done) < len(self.nodes):
            ready = [
                i
                for i, (_, after) in enumerate(self.nodes)
                if i not in done and not after & (set(range(len(self.nodes))) - done)
            ]
            i = random.choice(ready)
            self.nodes[i][0]()
            done.add(i)


class Branch:
    """The queue of a stream in a capture. `after`: what is complete when all of it is."""

    def __init__(self, graph: Graph, after: frozenset[int]) -> None:
        self.graph, self.after = graph, after

    def add(self, action: Callable[[], None]) -> None:
        self.graph.nodes.append((action, self.after))
        self.after |= {len(self.graph.nodes) - 1}

    def mark(self) -> Branch:
        return Branch(self.graph, self.after)

    def run_all(self) -> None:
        raise DeviceError("a stream in a capture cannot be waited for")


class Kernels:
    """The kernels of all launches so far, compiled when one is first run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.launches = folder, dict[str, Launch]()
        self.fails_in = 0  # launches; 0: never
        self._starts: dict[str, Callable[[Launch], None]] = {}

    def run(self, launch: Launch) -> None:
        if launch.name not in self._starts:
            new = [each for name, each in self.launches.items() if name not in self._starts]
            folder = self.folder / str(len(self.launches))
            folder.mkdir()
            self._starts |= dict.fromkeys((each.name for each in new), starter(folder, new))
        self._starts[launch.name](launch)


def working_gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Any:
    """The device, until the end of the test."""
    random.seed(3)
    machine("gpu")
    device: Any = backends.get("cuda")
    device.synchronize()  # imports the driver
    driver = sys.modules["pycuda.driver"]

    def load(self: Context, launches: list[Launch]) -> None:
        kernels.launches.update((launch.name, launch) for launch in launches)

    def start(self: Context, launch: Launch, stream: Any = None) -> None:
        kernels.fails_in -= 1
        if kernels.fails_in == 0:
            raise ValueError("a test")
        (stream or self.stream).queue.add(lambda: kernels.run(launch))

    def wait_for_event(self: Any, event: Any) -> None:
        if isinstance(event.mark, Branch):
            if not isinstance(self.queue, Branch):
                event.mark.graph.enter(self, event.mark.after)
            self.queue.after |= event.mark.after
        else:
            self.queue.add(event.mark.wait)

    def begin() -> None:
        own = device.context.stream
        Graph(own).enter(own, frozenset())

    def end() -> Graph:
        queue: Any = device.context.stream.queue
        return queue.graph.end()

    monkeypatch.setattr(Context, "load", load)
    monkeypatch.setattr(Context, "start", start)
    monkeypatch.setattr(driver.Stream, "wait_for_event", wait_for_event)
    stream = SimpleNamespace(begin_capture=begin, end_capture=end)
    cupy = SimpleNamespace(cuda=SimpleNamespace(ExternalStream=lambda *_: stream))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return device
