"""Programs that tests start. Each has its own session, so that its children can be ended too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """What a program printed, its exit status (None if it was stopped), and its seconds."""

    out: str
    err: str
    status: int | None
    seconds: float

    def __str__(self) -> str:
        end = "stopped" if self.status is None else f"exit status {self.status}"
        return f"{end} after {self.seconds:.1f} s\n{self.out[-2000:]}\n{self.err[-2000:]}"


def environment(**variables: str) -> dict[str, str]:
    """Variables for a program that imports pyggml from here, without PYGGML_VERIFY."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "PYGGML_VERIFY": ""}
    return {**os.environ, **own, **variables}


class Program:
    """A command that is running."""

    def __init__(self, command: Sequence[str], text: str = "", **variables: str) -> None:
        self.out, self.err, stdin = (TemporaryFile("w+") for _ in range(3))  # noqa: SIM115
        stdin.write(text)
        stdin.seek(0)
        self.begin = perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=self.out,
            stderr=self.err,
            cwd=ROOT,
            env=environment(**variables),
            start_new_session=True,
        )
        stdin.close()

    def wait(self, seconds: float) -> Result:
        """Wait until it ends; stop it and its children after `seconds`."""
        status: int | None = None
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Result(texts[0], texts[1], status, perf_counter() - self.begin)


def python(*words: str, text: str = "", **variables: str) -> Program:
    """Start Python with these arguments; `text` is its standard input."""
    return Program([sys.executable, "-W", "ignore", *words], text, **variables)
