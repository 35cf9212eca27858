"""A command in one of several processes that mpiexec started, by `--nproc N` or by hand.

A process that fails prints its error if it is the first one of its machine to do so, and leaves at
once. Then mpiexec ends the others, without a word. So there is one error, of the rank that failed.
MPI starts before anything can fail, because mpiexec does that only for processes that have MPI.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any

from pyggml.cli import options
from pyggml.cli.launch import PATIENCE, launch, launcher
from pyggml.cli.options import UsageError
from pyggml.cli.progress import clear
from pyggml.cli.terminal import print_error
from pyggml.runtime.mpi import join, launched, leave_at_once
from pyggml.runtime.ranks import PeerError, Ranks

#: Seconds for which the first one that fails stays: those that fail with it are silent.
HOLD = 0.5
#: What a rank does not compare with the others: its own file may have another path.
_OWN = ("m", "run", "parser", "debug", "ranks")
#: Commands that read what the user types.
_READING = ("chat",)


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """The option --nproc of a command that runs in several processes."""
    parser.add_argument(
        "--nproc", metavar="N", type=options.count,
        help="run in N processes, each with a device of its own; needs the extra mpi (default: "
        "those of mpiexec, else this one)",
    )  # fmt: skip


def begin() -> None:
    """Start MPI in a process of several before anything can fail: the others wait for that."""
    job = launched()
    if job is not None and job[1] > 1:
        _tell(join())


def start(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the command in this process, or in those of --nproc."""
    job, n = launched(), getattr(args, "nproc", None)
    args.ranks = None
    if job is None:
        if n is not None and n > 1:
            return launch(words, n, reads=bool(words) and words[0] in _READING)
        return run(args)
    rank, size = job
    if hasattr(args, "nproc"):
        return _run_together(args, size)
    return run(args) if rank == 0 else 0


def is_first(args: argparse.Namespace) -> bool:
    """Whether this process writes files and reads what the user types: rank 0, or the only one."""
    ranks = getattr(args, "ranks", None)
    return ranks is None or bool(ranks.rank == 0)


def run(args: argparse.Namespace) -> int:
    status: int = args.run(args)
    return status


# -- a process of several ----------------------------------------------------------------------


def _run_together(args: argparse.Namespace, size: int) -> int:
    if args.nproc not in (None, size):
        raise UsageError(f"--nproc {args.nproc}, but mpiexec has started {size}")
    ranks = join()
    if ranks.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
        warnings.simplefilter("ignore")
    if size > 1:
        args.backend = _places(args.backend, ranks)
        args.shard = args.shard or "auto"
    if getattr(args, "seed", 0) is None:
        args.seed = _seed(ranks)
    values = sorted((k, v) for k, v in vars(args).items() if k not in _OWN)
    ranks.agree("command line", "\n".join(f"{name}={value}" for name, value in values))
    args.ranks = ranks
    return run(args)


def _places(places: list[Any], ranks: Ranks) -> list[Any]:
    """A device for each rank; bench has a list of such lists."""
    if isinstance(places[0], list):
        return [ranks.places(each) for each in places]
    return ranks.places(places)


def _seed(ranks: Ranks) -> int:
    """A random seed, that of rank 0 for all."""
    return int(ranks.gather(str(int.from_bytes(os.urandom(4))))[0])


def _tell(ranks: Ranks) -> None:
    """Tell the process that started mpiexec which rank this is, and end if it is gone."""
    pipe = launcher()
    if pipe is None:
        return
    os.write(pipe, f"{ranks.rank} {os.getpid()}\n".encode())

    def watch() -> None:
        gone = select.poll()
        gone.register(pipe, select.POLLERR)
        gone.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def failed(error: BaseException, status: int, *, debug: bool) -> int:
    """Print an error and return the status. A process of several then ends, unless it is alone."""
    rank, size = launched() or (0, 1)
    if size == 1:
        report(error, debug=debug)
        return status
    if not speaks():
        time.sleep(PATIENCE)  # by now the one that spoke has ended this process
    if not isinstance(error, KeyboardInterrupt) or launcher() is None:
        report(error, debug=debug, whose="" if isinstance(error, PeerError) else f"rank {rank}: ")
        time.sleep(HOLD)
    leave_at_once(status)


def report(error: BaseException, *, debug: bool = False, whose: str = "") -> None:
    """Print an error, or that the command was interrupted."""
    clear()
    if isinstance(error, KeyboardInterrupt):
        print("pyggml: interrupted", file=sys.stderr)
    elif not isinstance(error, (SystemExit, BrokenPipeError)):
        print_error(error, debug=debug, whose=whose)


def speaks() -> bool:
    """Whether this process is the first to fail, of those that mpiexec has started on this machine.

    A name that only one process can have is freed when that process ends. Where there are no such
    names (elsewhere than on Linux), each process is the first.
    """
    global _name
    if _name is not None or not sys.platform.startswith("linux"):
        return True
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0pyggml-{os.getuid()}-{os.getppid()}")
    except OSError:
        return False
    _name = name  # taken until the process ends
    return True


_name: socket.socket | None = None
