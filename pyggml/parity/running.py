"""Run cases, in this process or in several; one outcome for each."""

from __future__ import annotations

import importlib
import math
import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from pyggml.backends.base import Backend, Runner
from pyggml.errors import DeviceError, GraphError, PyggmlError, UnknownNameError, UnsupportedOpError
from pyggml.graph import Graph
from pyggml.operation import cost_of
from pyggml.parity.case import Case, build, op_of
from pyggml.parity.check import check
from pyggml.parity.graph_case import GraphCase, is_graph
from pyggml.parity.graph_check import check_graph, valid
from pyggml.parity.guarded import NUMBER, Bed
from pyggml.parity.own import own_ops
from pyggml.parity.worker import Pool, Setup
from pyggml.passes.assign import assign
from pyggml.passes.work import Work
from pyggml.runtime import places

#: Seconds that a measurement takes.
MEASURED = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a case.

    status  "ok", "fail" or "unsupported"
    why     reason of the latter two
    error   NMSE, None if no numbers were compared;  bound: the largest NMSE allowed
    runs    number of runs of a measurement;  us, flops, nbytes: of one run
    """

    case: str
    status: str
    why: str = ""
    error: float | None = None
    bound: float | None = None
    runs: int = 0
    us: float = 0.0
    flops: float = 0.0
    nbytes: float = 0.0


def refusal(case: Case, backend: str) -> str | None:
    """Why the backend has no kernel for the case; None if it has one."""
    node, device = build(case, values=False).node, places.parse(backend).backend
    if not case.means:
        return None if node.op.view is not None else device.supports(node)
    try:
        assign(Work(Graph({"y": node}), (device,)))
    except UnsupportedOpError as error:
        return str(error)
    return None


def supported(case: Case, backend: str) -> Outcome:
    """Whether the backend has a kernel for the case."""
    reason = refusal(case, backend)
    return Outcome(str(case), "unsupported" if reason else "ok", reason or "")


def tested(case: Case, backend: str) -> Outcome:
    """Compare the case with the oracle. An exception of any kind in a kernel is a failure."""
    try:
        reason = refusal(case, backend)
        if reason:
            return Outcome(str(case), "unsupported", reason)
        result = check(case, backend)
    except DeviceError:
        raise
    except Exception as error:
        return Outcome(str(case), "fail", f"raised {type(error).__name__}: {error}")
    status = "ok" if result else "fail"
    return Outcome(str(case), status, "" if result else str(result), result.error, result.bound)


def measured(case: Case, backend: str) -> Outcome:
    """The mean time of a run, over as many runs as take MEASURED seconds, after a warm-up."""
    reason = refusal(case, backend)
    if reason:
        return Outcome(str(case), "unsupported", reason)
    built, device = build(case), places.parse(backend).backend
    bed = Bed(device, built.node, {**built.inputs, **built.states})
    placed = bed.place()
    placed.run(NUMBER)
    runs, seconds = 1, _seconds(placed.runner, device, 1)
    while seconds < MEASURED / 2:
        # Runs are counted, not timed: in half a second one may queue a day's work.
        runs = min(10 * runs, math.ceil(MEASURED * runs / seconds))
        seconds = _seconds(placed.runner, device, runs)
    us = seconds / runs * 1e6
    costs = [cost_of(node) for node in bed.work.graph.nodes]
    flops, nbytes = sum(cost.flops for cost in costs), sum(cost.nbytes for cost in costs)
    return Outcome(str(case), "ok", runs=runs, us=us, flops=flops, nbytes=nbytes)


def _seconds(runner: Runner, device: Backend, runs: int) -> float:
    """Seconds from the first run's start to the last one's end."""
    start = perf_counter()
    for _ in range(runs):
        runner.run()
    device.synchronize()
    return max(perf_counter() - start, 1e-9)


MODES: dict[str, Callable[[Case, str], Outcome]] = {
    "test": tested,
    "support": supported,
    "perf": measured,
}


def outcomes(
    cases: Sequence[Case], backend: str, mode: str = "test", jobs: int = 1, kernel: str = ""
) -> Iterator[Outcome]:
    """The outcome of each case, in order.

    jobs    number of processes, with one thread each
    kernel  `file.py:function`, which replaces the backend's kernel of the cases' op
    """
    setup = Setup(backend, mode, kernel, frozenset(case.op for case in cases))
    if jobs == 1:
        with prepared(setup):
            yield from (MODES[mode](case, backend) for case in cases)
        return
    mirror = mode == "test" and places.parse(backend).name == "cuda"
    with Pool(replace(setup, mirror=mirror), jobs) as pool:
        yield from pool.run([str(case) for case in cases])


def run_text(text: str, setup: Setup) -> Outcome:
    """The outcome of a case or a graph, given as text."""
    if is_graph(text):
        return graph_tested(text, setup.backend)
    return MODES[setup.mode](Case.parse(text), setup.backend)


def checked(text: str, own: str = "") -> None:
    """Raise a PyggmlError if `text` is not a valid case or graph. Runs nothing.

    own  a file whose ops the text may use
    """
    with own_ops(own) if own else nullcontext():
        if is_graph(text):
            valid(GraphCase.parse(text))
        else:
            build(Case.parse(text), values=False)


def check_kernel(kernel: str, backend: str, names: frozenset[str]) -> None:
    """Raise a PyggmlError if `file.py:function` cannot be the kernel of the one op in `names`."""
    with prepared(Setup(backend, kernel=kernel, ops=names)):
        pass


def op_in(text: str) -> str:
    """The name of a case's op."""
    return text.partition("(")[0].removesuffix(".means")


def graph_tested(text: str, backend: str) -> Outcome:
    """Compare the graph with its float64 values. An unexpected exception is a failure."""
    try:
        why = check_graph(GraphCase.parse(text), backend)
    except DeviceError:
        raise
    except UnsupportedOpError as error:
        return Outcome(text, "unsupported", str(error))
    except Exception as error:
        return Outcome(text, "fail", f"raised {type(error).__name__}: {error}")
    return Outcome(text, "fail" if why else "ok", why)


@contextmanager
def prepared(setup: Setup) -> Iterator[None]:
    """Install the setup's kernel and the user's own ops inside the context."""
    with ExitStack() as stack:
        if setup.file:
            stack.enter_context(own_ops(setup.file))
        if setup.kernel:
            table = stack.enter_context(restored(setup.backend))
            use_kernel(setup.kernel, set(setup.ops), table)
        yield


@contextmanager
def restored(backend: str) -> Iterator[Any]:
    """The module with the backend's `KERNELS`; the context restores the table at its end."""
    name = places.parse(backend).name
    try:
        table: Any = importlib.import_module(f"pyggml.backends.{name}.table")
    except ModuleNotFoundError:
        raise PyggmlError(
            f"the backend {name} has no Python kernel table; --kernel needs one"
        ) from None
    before = dict(table.KERNELS)
    try:
        yield table
    finally:
        table.KERNELS.clear()
        table.KERNELS.update(before)


def use_kernel(kernel: str, names: set[str], table: Any) -> None:
    """Put `file.py:function` into the table as the kernel of the one op in `names`.

    A function that its file decorates with `@kernel(...)` keeps what it declares there.
    """
    file, _, function = kernel.rpartition(":")
    if len(names) != 1:
        raise GraphError(
            f"--kernel replaces the kernel of one op; name one with -o, got {len(names)}"
        )
    if not file.endswith(".py") or not function:
        raise UnknownNameError(
            f"--kernel {kernel!r}: expected file.py:function, such as my.py:relu"
        )
    if not Path(file).is_file():
        raise UnknownNameError(f"--kernel {kernel!r}: there is no file {file}")
    try:
        module = runpy.run_path(file)
    except Exception as error:
        raise PyggmlError(f"--kernel: {file} raised {type(error).__name__}: {error}") from error
    run = module.get(function)
    if not callable(run):
        raise UnknownNameError(f"--kernel {kernel!r}: {file} has no function {function!r}")
    op = op_of(names.pop())
    if op not in table.KERNELS or table.KERNELS[op].run is not run:
        table.kernel(op, types=None)(run)
