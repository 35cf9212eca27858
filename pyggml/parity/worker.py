"""Processes that run cases and survive the death of one: a new process runs the remaining cases.

A GPU kernel that reads past its memory ends its process, or leaves a device that refuses all
further work. The worker knows which case ran then, reports it, and continues with the next one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any

from pyggml import errors
from pyggml.errors import DeviceError, PyggmlError

#: Cases that a process takes at a time.
CHUNK = 50
#: Seconds to wait for a case before its process is killed.
PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What every process needs to know; it is sent once.

    mode    a key of `running.MODES`
    kernel  `file.py:function`, which replaces the backend's kernel of `ops`
    file    a file that defines the user's own ops
    mirror  keep the device's memory on the host between runs (parity.mirror)
    """

    backend: str
    mode: str = "test"
    kernel: str = ""
    ops: frozenset[str] = frozenset()
    file: str = ""
    mirror: bool = False


class Worker:
    """One process, started on first use and again after its death."""

    def __init__(self, setup: Setup, patience: float = PATIENCE) -> None:
        self.setup, self.patience = setup, patience
        self.deaths = 0
        self._process: BaseProcess | None = None
        self._pipe: Any = None

    def run(self, texts: Sequence[str]) -> Iterator[Any]:
        """The outcome of each case, in order."""
        pending = list(texts)
        while pending:
            for outcome in self._until_death(tuple(pending)):
                pending.pop(0)
                yield outcome

    def _until_death(self, texts: tuple[str, ...]) -> Iterator[Any]:
        """Outcomes up to and including the first case that ends the process."""
        from pyggml.parity.running import Outcome

        self._start()
        self._pipe.send(list(texts))
        for text in texts:
            why = ""
            try:
                if self._pipe.poll(self.patience):
                    outcome, alive = self._pipe.recv()
                    yield outcome
                    if alive:
                        continue
                else:
                    why = f"hung: no answer after {self.patience:g} s"
            except (EOFError, ConnectionResetError):
                why = f"died: {self._cause()}"
            self.deaths += 1
            self.close(kill=True)
            if why:
                yield Outcome(text, "fail", why)
            return

    def _start(self) -> None:
        if self._process is not None:
            return
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.setdefault(name, "1")  # the new process reads it
        context = get_context("spawn")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, self.setup), daemon=True)
        self._process.start()
        other_end.close()
        try:
            error = self._pipe.recv()
        except EOFError:
            error = "DeviceError", f"the process for {self.setup.backend} died: {self._cause()}"
        if error is not None:
            self.close(kill=True)
            name, text = error
            raise getattr(errors, name)(text)

    def _cause(self) -> str:
        """The signal or the exit status that ended the process."""
        assert self._process is not None
        self._process.join(10)
        code = self._process.exitcode
        if code is not None and code < 0:
            return signal.Signals(-code).name
        return f"exit status {code}"

    def close(self, kill: bool = False) -> None:
        if self._process is None:
            return
        self._pipe.close()
        if kill:
            self._process.kill()
        self._process.join()
        self._process = self._pipe = None


class Pool:
    """Several workers; outcomes come in the order of the cases.

    chunk  cases that a worker takes at a time; their outcomes arrive together
    """

    def __init__(self, setup: Setup, jobs: int = 1, chunk: int = CHUNK) -> None:
        self.chunk = chunk
        self.workers = [Worker(setup) for _ in range(jobs)]
        self._free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.workers:
            self._free.put(worker)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()

    @property
    def deaths(self) -> int:
        return sum(worker.deaths for worker in self.workers)

    def run(self, texts: Sequence[str]) -> Iterator[Any]:
        """The outcome of each case, in order."""
        if len(self.workers) == 1:
            yield from self.workers[0].run(texts)
            return
        chunks = [texts[i : i + self.chunk] for i in range(0, len(texts), self.chunk)]
        with ThreadPoolExecutor(len(self.workers)) as threads:
            for part in threads.map(self._chunk, chunks):
                yield from part

    def _chunk(self, texts: Sequence[str]) -> list[Any]:
        worker = self._free.get()
        try:
            return list(worker.run(texts))
        finally:
            self._free.put(worker)


def _serve(pipe: Connection, setup: Setup) -> None:
    """The process's main function: run the cases that arrive until the pipe closes."""
    from pyggml.parity import running
    from pyggml.parity.mirror import mirrored
    from pyggml.runtime import places

    with ExitStack() as stack:
        try:
            place = places.parse(setup.backend)
            if setup.mode != "support":
                place.backend.alloc(0)  # fails now if there is no such device
            if setup.mirror:
                stack.enter_context(mirrored(place.name, place.index))
            stack.enter_context(running.prepared(setup))
        except PyggmlError as error:
            name = type(error).__name__
            pipe.send((name if hasattr(errors, name) else "PyggmlError", str(error)))
            return
        pipe.send(None)
        with suppress(EOFError, OSError, KeyboardInterrupt):  # the parent closed the pipe
            while _answer(pipe, setup, pipe.recv()):
                pass


def _answer(pipe: Connection, setup: Setup, texts: Sequence[str]) -> bool:
    """Run cases and send their outcomes; false if the device can run no more."""
    from pyggml.parity import running

    for text in texts:
        try:
            outcome, alive = running.run_text(text, setup), True
        except DeviceError as error:
            why = f"died: {type(error).__name__}: {error}"
            outcome, alive = running.Outcome(text, "fail", why), False
        pipe.send((outcome, alive))
        if not alive:
            return False
    return True
