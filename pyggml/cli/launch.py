"""`--nproc N`: mpiexec starts N processes of this command line, and this one waits for it.

Of a process that was killed, mpiexec prints a banner with its number on stdout. Here that becomes
one error with its rank. The processes see that this one is gone by a pipe that it holds, and end.

Becoming mpiexec (exec) lost: it takes less, but then the banner is all that a user gets, and after
Ctrl-C several lines of mpiexec's own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from pyggml.backends.processors import n_processors
from pyggml.cli.progress import clear
from pyggml.errors import DeviceError, MissingPackageError
from pyggml.extras import install_command

#: Seconds that processes have to end after Ctrl-C.
PATIENCE = 5.0
#: What mpiexec prints on stdout before it tells of a process that was killed.
_BANNER = b"\n" + b"=" * 83 + b"\n=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES"
#: What a signal mostly means.
_CAUSES: Mapping[int, str] = {
    signal.SIGKILL: " (the system does that if memory runs out)",
    signal.SIGALRM: " because other processes did not start MPI",
}


def launcher() -> int | None:
    """In a process of `launch`: the descriptor to which it writes its rank and its number."""
    text = os.environ.get("PYGGML_LAUNCHER")
    return int(text) if text else None


def launch(words: Sequence[str], n: int, *, reads: bool = False) -> int:
    """Run this command line in `n` processes of mpiexec, and return the exit status.

    reads  rank 0 reads this process's input
    """
    command = [_mpiexec(), "-n", str(n), sys.executable, "-m", "pyggml", *words]
    read, write = os.pipe()
    os.set_blocking(read, False)
    environment = _threads(n) | os.environ | {"PYGGML_LAUNCHER": str(write)}
    process = subprocess.Popen(
        command,
        stdin=None if reads else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
        pass_fds=[write],
        start_new_session=True,  # Ctrl-C reaches this process, which passes it on
    )
    os.close(write)
    assert process.stdout is not None
    try:
        banner = _relay(process.stdout, sys.stdout.buffer)
        status = process.wait()
        if banner:
            raise DeviceError(_killed(banner, _ranks_of(read)))
    except BaseException:
        _stop(process)
        raise
    finally:
        os.close(read)
    return status if status >= 0 else 128 - status


def _mpiexec() -> str:
    """The launcher: that of the package mpich if it is installed, as mpi4py then uses its MPI."""
    beside = Path(sys.executable).with_name("mpiexec")
    path = str(beside) if beside.is_file() else shutil.which("mpiexec")
    if path is None or find_spec("mpi4py") is None:
        raise MissingPackageError(
            "--nproc needs mpiexec and mpi4py; install the extra 'mpi': " + install_command("mpi")
        )
    return path


def _threads(n: int) -> dict[str, str]:
    """The processors of this machine, divided among n processes."""
    each = str(max(1, n_processors() // n))
    return dict.fromkeys(("PYGGML_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), each)


def _relay(stdout: IO[bytes], target: IO[bytes]) -> bytes:
    """Pass the output on as it comes, except what mpiexec prints about a process that was killed;
    return that."""
    rest = b""
    while chunk := os.read(stdout.fileno(), 1 << 16):
        rest += chunk
        at = rest.find(_BANNER)
        # What may be the beginning of the banner has to wait for the next part.
        tail = (i for i in range(max(0, len(rest) - len(_BANNER)), len(rest)))
        end = next((i for i in tail if _BANNER.startswith(rest[i:])), len(rest))
        end = at if at >= 0 else end
        target.write(rest[:end])
        target.flush()
        rest = rest[end:]
    if rest.startswith(_BANNER):
        return rest
    target.write(rest)
    target.flush()
    return b""


def _ranks_of(read: int) -> dict[int, int]:
    """Number of a process -> its rank, as the processes have written it."""
    text = b""
    with suppress(BlockingIOError):
        while part := os.read(read, 1 << 16):
            text += part
    pairs = [line.split() for line in text.decode().splitlines()]
    return {int(number): int(rank) for rank, number in pairs}


def _killed(banner: bytes, ranks: dict[int, int]) -> str:
    """The error about the process of which mpiexec's banner tells."""
    pid, code = re.search(rb"PID (\d+)", banner), re.search(rb"EXIT CODE: (\d+)", banner)
    if pid is None or code is None:
        return f"mpiexec: {' '.join(banner.decode(errors='replace').split())}"
    number, status = int(pid[1]), int(code[1])
    who = f"rank {ranks[number]} (process {number})" if number in ranks else f"process {number}"
    how = _CAUSES.get(status, "")
    try:
        return f"{who} was killed by {signal.Signals(status).name}{how}; the others were ended, too"
    except ValueError:
        return f"{who} ended with status {status}; the others were ended, too"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End mpiexec and all that it started: at first kindly."""
    clear()
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()  # what it has started ends with it
        process.wait()
