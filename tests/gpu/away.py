"""A process that calls functions for this one. If a kernel ends it, the next call starts a new
process."""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any, Literal, NamedTuple

import pytest

#: Errors of pyggml, CuPy and PyTorch after which a process can no longer use the GPU.
LOST = re.compile("can no longer use the GPU|CUDA_ERROR_|cudaError|AcceleratorError")
#: Time limit of a call, in seconds.
PATIENCE = 180.0


class Answer(NamedTuple):
    """The result of a call: its value, the reason for a skip, or the text of a failure."""

    status: Literal["ok", "skip", "fail"]
    value: Any


class Process:
    """Starts with the first call, and again after a call that ended it."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._process: Any = None
        self._pipe: Any = None

    def call(self, function: Callable[..., Any], *args: Any, **named: Any) -> Answer:
        """Call a function of a module; the arguments must be picklable."""
        if self._process is None:
            context = get_context("spawn")
            self._pipe, remote = context.Pipe()
            self._process = context.Process(target=_serve, args=(remote,), daemon=True)
            self._process.start()
            remote.close()
        try:
            self._pipe.send((function, args, named))
            if not self._pipe.poll(self.patience):
                self.close(0)
                return Answer("fail", f"no answer within {self.patience:g} s")
            answer: Answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            return Answer("fail", f"the process died: {self.close()}")
        if answer.status == "fail" and LOST.search(answer.value):
            self.close()
        return answer

    def close(self, seconds: float = 5) -> str:
        """End the process, by force after `seconds`; return how it ended."""
        process, self._process = self._process, None
        if process is None:
            return "it was not running"
        self._pipe.close()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _serve(pipe: Any) -> None:
    """Answer calls until the other end is closed."""
    while True:
        try:
            function, args, named = pipe.recv()
        except EOFError:
            return
        try:
            answer = Answer("ok", function(*args, **named))
        except pytest.skip.Exception as skip:
            answer = Answer("skip", str(skip))
        except Exception:
            answer = Answer("fail", traceback.format_exc())
        pipe.send(answer)
