"""Processes that run cases, each announced before it runs: one that dies leaves its name behind.

A kernel that reads past its memory on a GPU ends the process, or leaves a device that refuses all
further work. What ran then is known, and a new process goes on with the next case.
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
#: Seconds after which a case that does not end is given up.
PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What every process is told once.

    mode    of `running.MODES`
    kernel  `file.py:function` in place of the backend's kernel of `ops`
    file    with ops of the user's own
    mirror  whether the device's memory is on the host between runs (parity.mirror)
    """

    backend: str
    mode: str = "test"
    kernel: str = ""
    ops: frozenset[str] = frozenset()
    file: str = ""
    mirror: bool = False


class Worker:
    """One process, started when it is needed and again when it has died."""

    def __init__(self, setup: Setup, patience: float = PATIENCE) -> None:
        self.setup, self.patience = setup, patience
        self.deaths = 0
        self._process: BaseProcess | None = None
        self._pipe: Any = None

    def run(self, texts: Sequence[str]) -> Iterator[Any]:
        """The outcome of each case, in order."""
        rest = list(texts)
        while rest:
            for outcome in self._some(tuple(rest)):
                rest.pop(0)
                yield outcome

    def _some(self, texts: tuple[str, ...]) -> Iterator[Any]:
        """Outcomes up to the first case that ends the process, its own included."""
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
            os.environ.setdefault(name, "1")  # read by the process that starts now
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.setup), daemon=True)
        self._process.start()
        theirs.close()
        try:
            error = self._pipe.recv()
        except EOFError:
            error = "DeviceError", f"the process for {self.setup.backend} died: {self._cause()}"
        if error is not None:
            self.close(kill=True)
            kind, text = error
            raise getattr(errors, kind)(text)

    def _cause(self) -> str:
        """How the process ended."""
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
    """Workers side by side; outcomes come in the order of the cases.

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
        """The outcome of each case."""
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
    """The process: runs what it is sent until the pipe closes."""
    from pyggml.parity import running
    from pyggml.parity.mirror import mirrored
    from pyggml.runtime import places

    with ExitStack() as stack:
        try:
            place = places.parse(setup.backend)
            if setup.mode != "support":
                place.backend.alloc(0)  # a device that is not there says so now
            if setup.mirror:
                stack.enter_context(mirrored(place.name, place.index))
            stack.enter_context(running.prepared(setup))
        except PyggmlError as error:
            kind = type(error).__name__
            pipe.send((kind if hasattr(errors, kind) else "PyggmlError", str(error)))
            return
        pipe.send(None)
        with suppress(EOFError, OSError, KeyboardInterrupt):  # whoever asked is gone
            while _answered(pipe, setup, pipe.recv()):
                pass


def _answered(pipe: Connection, setup: Setup, texts: Sequence[str]) -> bool:
    """Run some cases and send what became of each; whether the device is still of use."""
    from pyggml.parity import running

    for text in texts:
        try:
            outcome, alive = running.one(text, setup), True
        except DeviceError as error:
            why = f"died: {type(error).__name__}: {error}"
            outcome, alive = running.Outcome(text, "fail", why), False
        pipe.send((outcome, alive))
        if not alive:
            return False
    return True
