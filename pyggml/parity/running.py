"""Cases run one by one or by several processes; what becomes of each as one small record."""

from __future__ import annotations

import importlib
import math
import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from pyggml.backends.base import Backend, Runner
from pyggml.errors import DeviceError, GraphError, PyggmlError, UnknownNameError, UnsupportedOpError
from pyggml.graph import Graph
from pyggml.node import cost_of
from pyggml.parity.case import Case, build, op_of
from pyggml.parity.check import check
from pyggml.parity.graph_case import GraphCase, is_graph
from pyggml.parity.graph_check import check_graph
from pyggml.parity.guarded import NUMBER, Bed
from pyggml.parity.own import own_ops
from pyggml.parity.worker import Pool, Setup
from pyggml.passes.assign import assign
from pyggml.passes.work import Work
from pyggml.runtime import places

#: Seconds that a measurement lasts.
MEASURED = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case.

    status  "ok", "fail", "unsupported"; why: the reason of the last two
    error   NMSE (None where no numbers came to be compared), and the bound that it is held to
    runs    of a measurement, with us, flops and nbytes of one
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
    """Why the backend does not run the case itself; None where it does."""
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
    """The case against the oracle. A kernel may raise anything: that is a failure like others."""
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
    """Time of one run: the mean of as many as take MEASURED seconds, after one to warm up."""
    reason = refusal(case, backend)
    if reason:
        return Outcome(str(case), "unsupported", reason)
    built, device = build(case), places.parse(backend).backend
    bed = Bed(device, built.node, {**built.inputs, **built.states})
    placed = bed.place()
    placed.run(NUMBER)
    runs, seconds = 1, _seconds(placed.runner, device, 1)
    while seconds < MEASURED / 2:
        # Counted, not timed: a device may take in more work in half a second than it does in a day.
        runs = min(10 * runs, math.ceil(MEASURED * runs / seconds))
        seconds = _seconds(placed.runner, device, runs)
    us = seconds / runs * 1e6
    costs = [cost_of(node) for node in bed.work.graph.nodes]
    flops, nbytes = sum(cost.flops for cost in costs), sum(cost.nbytes for cost in costs)
    return Outcome(str(case), "ok", runs=runs, us=us, flops=flops, nbytes=nbytes)


def _seconds(runner: Runner, device: Backend, runs: int) -> float:
    """How long so many runs take, the last one finished."""
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

    jobs    processes to share the work, each with one thread of its own
    kernel  `file.py:function`, which takes the place of the backend's kernel of the cases' op
    """
    setup = Setup(backend, mode, kernel, frozenset(case.op for case in cases))
    if jobs == 1:
        with prepared(setup):
            yield from (MODES[mode](case, backend) for case in cases)
        return
    mirror = mode == "test" and places.parse(backend).name == "cuda"
    with Pool(replace(setup, mirror=mirror), jobs) as pool:
        yield from pool.run([str(case) for case in cases])


def one(text: str, setup: Setup) -> Outcome:
    """What becomes of a case, or of a graph, that is given as its text."""
    if is_graph(text):
        return graph_tested(text, setup.backend)
    return MODES[setup.mode](Case.parse(text), setup.backend)


def graph_tested(text: str, backend: str) -> Outcome:
    """The graph against its float64 values; an error that it may not raise is a failure."""
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
    """Inside, the kernel of the setup takes its place, and the user's own ops are known."""
    with ExitStack() as stack:
        if setup.file:
            stack.enter_context(own_ops(setup.file))
        if setup.kernel:
            table = stack.enter_context(restored(setup.backend))
            use_kernel(setup.kernel, set(setup.ops), table)
        yield


@contextmanager
def restored(backend: str) -> Iterator[Any]:
    """The module with the backend's `KERNELS`, which are afterwards what they were."""
    name = places.parse(backend).name
    try:
        table: Any = importlib.import_module(f"pyggml.backends.{name}.table")
    except ModuleNotFoundError:
        raise PyggmlError(f"the backend {name} has no table of kernels in Python") from None
    before = dict(table.KERNELS)
    try:
        yield table
    finally:
        table.KERNELS.clear()
        table.KERNELS.update(before)


def use_kernel(kernel: str, names: set[str], table: Any) -> None:
    """Put `file.py:function` into the table for the one op named.

    A function that its file has put there itself, with `@kernel(...)`, keeps what it declared.
    """
    file, _, function = kernel.rpartition(":")
    if len(names) != 1:
        raise GraphError(f"--kernel is of one op: say which with -o; now there are {len(names)}")
    if not file.endswith(".py") or not function:
        raise UnknownNameError(
            f"--kernel {kernel!r}: it takes file.py:function, such as my.py:relu"
        )
    if not Path(file).is_file():
        raise UnknownNameError(f"--kernel {kernel!r}: there is no file {file}")
    try:
        space = runpy.run_path(file)
    except Exception as error:
        raise PyggmlError(f"--kernel: {file} raised {type(error).__name__}: {error}") from error
    found = space.get(function)
    if not callable(found):
        raise UnknownNameError(f"--kernel {kernel!r}: {file} has no function {function!r}")
    op = op_of(names.pop())
    if op not in table.KERNELS or table.KERNELS[op].run is not found:
        table.kernel(op, types=None)(found)
