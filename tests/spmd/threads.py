"""Ranks as threads of this process: what MPI does between processes, without starting any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock, Thread
from typing import Any

from pyggml.runtime.ranks import Bytes, Ranks


@dataclass
class Wires:
    """Messages by sender, receiver and tag, in order: the data, and whether it was received."""

    size: int
    boxes: dict[tuple[int, int, int], list[list[Any]]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def box(self, sender: int, receiver: int, tag: int) -> list[list[Any]]:
        with self.lock:
            return self.boxes.setdefault((sender, receiver, tag), [])


class Sending:
    def __init__(self, entry: list[Any]) -> None:
        self._entry = entry

    def done(self) -> bool:
        return bool(self._entry[1])


class Receiving:
    def __init__(self, box: list[list[Any]], data: Bytes) -> None:
        self._box, self._data, self._done = box, data, False

    def done(self) -> bool:
        if not self._done and self._box:
            entry = self._box.pop(0)
            assert len(entry[0]) == len(self._data), "a message of another size"
            self._data[...] = entry[0]
            entry[1] = self._done = True
        return self._done


class ThreadTransport:
    """A message is copied when it is received: a sender that changes it too early is found."""

    def __init__(self, wires: Wires, rank: int) -> None:
        self._wires = wires
        self.rank = self.local = rank
        self.size = wires.size

    def send(self, data: Bytes, to: int, tag: int) -> Sending:
        entry = [data, False]
        self._wires.box(self.rank, to, tag).append(entry)
        return Sending(entry)

    def receive(self, data: Bytes, source: int, tag: int) -> Receiving:
        return Receiving(self._wires.box(source, self.rank, tag), data)

    def sender(self, tag: int) -> int | None:
        senders = range(self.size)
        return next((s for s in senders if self._wires.box(s, self.rank, tag)), None)


def ranks_of(n: int) -> list[Ranks]:
    wires = Wires(n)
    return [Ranks(ThreadTransport(wires, rank)) for rank in range(n)]


def results(actions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each action returns, or its error; all run at the same time."""
    found: list[Any] = [TimeoutError("a rank hangs")] * len(actions)

    def run(i: int) -> None:
        try:
            found[i] = actions[i]()
        except Exception as error:
            found[i] = error

    threads = [Thread(target=run, args=(i,), daemon=True) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def every(actions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each action returns. An error of one is raised."""
    found = results(actions)
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found
