"""What `pyggml bench` and `pyggml sweep` share: output, plots, and numbers of threads."""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyggml import errors
from pyggml.cli import options
from pyggml.cli.model_options import load_weights
from pyggml.cli.options import UsageError, wrong_usage
from pyggml.cli.processes import is_first
from pyggml.cli.progress import clear, progress
from pyggml.cli.terminal import text_of
from pyggml.errors import DeviceError, DTypeError, PyggmlError

if TYPE_CHECKING:
    from pyggml.bench.panels import Panel
    from pyggml.bench.peers import Peer
    from pyggml.bench.tables import Record, Writer
    from pyggml.generate.session import Session

R = TypeVar("R", bound="Record")
#: Seconds in which an interrupted process must send its last row.
_PATIENCE = 10


def add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    add = options.by_first_name(group.add_argument)
    add("-t", "--threads", type=options.numbers(1), metavar="N,..", action=options.Values,
        default=[None], help="threads on the host; each number runs in its own process (default: "
        "as the environment says)")  # fmt: skip
    add("--no-warmup", action="store_true",
        help="no untimed runs first; then times include loading and compiling")  # fmt: skip
    add("--random-weights", action="store_true",
        help="take random weights in place of the file's, which may be only a header")  # fmt: skip
    add("-o", "--output", choices=options.FORMATS, default="md",
        help="form of the output (default: md)")  # fmt: skip
    add("--plot", metavar="FILE", type=_plot,
        help="draw the speeds to FILE.svg or FILE.png (needs the extra plot)")  # fmt: skip
    add("--peers", metavar="FILE", type=Path,
        help="with --plot: more lines, from a record of peers or from the JSON of llama-bench or "
        "pyggml bench")  # fmt: skip


@options.option
def _plot(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise DTypeError(f"must end in .svg or .png, got {text!r}")
    if not path.absolute().parent.is_dir():
        raise DTypeError(f"there is no folder {path.absolute().parent}")
    return path


def check_together(args: argparse.Namespace) -> None:
    """UsageError for what several processes cannot do."""
    ranks = getattr(args, "ranks", None)
    if args.t != [None] and ranks is not None and ranks.size > 1:
        raise UsageError(
            f"-t starts a process for each number of threads, so it is not for {ranks.size} "
            "processes; set PYGGML_THREADS"
        )


def peers_of(args: argparse.Namespace) -> list[Peer]:
    """The peers of --peers. Checks all of a plot that can be wrong, before anything is measured."""
    from pyggml.bench import peers, plot

    if args.plot is None:
        if args.peers is not None:
            raise UsageError("--peers needs --plot")
        return []
    plot.check()
    if args.peers is None:
        return []
    with wrong_usage():
        return peers.read(args.peers)


def report(
    args: argparse.Namespace,
    table: Callable[[], Writer],
    records: Iterable[R],
    panels_of: Callable[[Sequence[R]], Sequence[Panel]],
) -> None:
    """Print the records as they come, and draw them. After Ctrl-C or an error, those so far.

    table  the writer of -o md
    """
    from pyggml.bench import panels, plot, tables

    writer: Writer = table() if args.o == "md" else tables.DATA[args.o]()
    rows: list[R] = []
    stop: BaseException | None = None
    try:
        for record in records:
            if not rows:
                _print(writer.begin())
            rows.append(record)
            _print(writer.record(record))
    except (KeyboardInterrupt, PyggmlError, OSError) as error:
        stop = error
    if rows:
        _print(writer.end())
    if args.plot is not None and is_first(args) and rows and (drawings := panels_of(rows)):
        plot.draw(drawings, args.plot, panels.title([row.setting for row in rows]))
    if stop is not None:
        raise stop


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        clear()
        print(line, flush=True)


class Runs:
    """On a terminal, shows how many runs are done. `begin` and `ran` are arguments of `measure`."""

    def __init__(self, what: str, total: int) -> None:
        self._show, self._total, self._done = progress(what, "runs"), total, 0

    def begin(self, session: Session) -> None:
        load_weights(session)
        self._shown()

    def ran(self) -> None:
        self._done += 1
        self._shown()

    def _shown(self) -> None:
        if self._show is not None:
            self._show(self._done, self._total)


def unknown_to_models(args: argparse.Namespace) -> dict[str, object]:
    """llama-bench's fields of -ngl and -ot."""
    return {
        "n_gpu_layers": -1 if args.ngl is None else args.ngl,
        "tensor_buft_overrides": pins_text(args.ot),
    }


def pins_text(pairs: Sequence[tuple[str, str]]) -> str:
    return ";".join(f"{pattern}={place}" for pattern, place in pairs) or "none"


# -- threads ----------------------------------------------------------------------------------


def with_threads(
    records: Callable[[argparse.Namespace], Iterator[R]], args: argparse.Namespace
) -> Iterator[R]:
    """The records for each number of -t. Without -t, they are measured in this process.

    BLAS reads the number when NumPy is imported, and the cpu backend when it first runs, so each
    number needs a new process.
    """
    for number in args.t:
        if number is None:
            yield from records(args)
        else:
            yield from _in_process(records, args, number)


def _in_process(
    records: Callable[[argparse.Namespace], Iterator[R]], args: argparse.Namespace, number: int
) -> Iterator[R]:
    context = get_context("spawn")
    pipe, other_end = context.Pipe()
    args = argparse.Namespace(**{k: v for k, v in vars(args).items() if k != "run"})
    process = context.Process(target=_serve, args=(other_end, records, args), daemon=True)
    with _environment(number):
        process.start()
    other_end.close()
    try:
        yield from _received(pipe, number)
    except KeyboardInterrupt:
        if process.is_alive() and pipe.poll(_PATIENCE):  # it was interrupted, too, and has a row
            yield from _received(pipe, number)
        raise
    finally:
        pipe.close()
        process.join(_PATIENCE)
        process.kill()


@contextmanager
def _environment(number: int) -> Iterator[None]:
    """The variables that say how many threads the backends in the host's memory use are set."""
    before = {
        name: os.environ.get(name)
        for name in ("PYGGML_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    }
    os.environ |= dict.fromkeys(before, str(number))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class ChildError(Exception):
    """The traceback of an error in another process, as the cause of the error here."""


def _received(pipe: Connection, number: int) -> Iterator[Any]:
    """What the process sends, until it has ended or was interrupted."""
    while True:
        try:
            kind, value = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise DeviceError(f"the process with {number} threads died") from None
        if kind == "record":
            yield value
        elif kind == "error":
            name, text, trace = value
            raise getattr(errors, name, DeviceError)(text) from ChildError(trace)
        elif kind == "interrupted":
            raise KeyboardInterrupt
        else:
            return


def _serve(
    pipe: Connection, records: Callable[[argparse.Namespace], Iterator[Any]],
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Send the records."""
    try:
        for record in records(args):
            clear()
            pipe.send(("record", record))
        pipe.send(("end", None))
    except KeyboardInterrupt:
        clear()
        pipe.send(("interrupted", None))
    except Exception as error:
        clear()
        trace = "".join(traceback.format_exception(error))
        pipe.send(("error", (type(error).__name__, text_of(error), trace)))
