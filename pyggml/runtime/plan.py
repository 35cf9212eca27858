"""Plan: a graph made ready for devices, its memory known, run many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

from pyggml.backends.base import Address, Runner, Step
from pyggml.errors import DeviceError, DTypeError, OutOfMemoryError
from pyggml.graph import Graph
from pyggml.node import Node, Spec
from pyggml.ops.leaf import constant_op, data_of
from pyggml.passes.work import Split, Work
from pyggml.quants import decode_rows
from pyggml.runtime.execution import Execution, addresses
from pyggml.runtime.inputs import Bound, Ready, together
from pyggml.runtime.leaves import Progress
from pyggml.runtime.memory import Memory
from pyggml.runtime.planned import Planned, Request
from pyggml.runtime.report import Profile, plan_text
from pyggml.runtime.store import Store

T = TypeVar("T")
Arrays = Mapping[str, object] | None


class Plan:
    """A graph compiled against a store. `compile` makes it; it holds no memory before `bind`.

    An interrupted call leaves a plan as it was or as it was to be: each of the three parts that
    change is replaced by one assignment, and `_ready` asks whether they still belong together.
    """

    def __init__(self, request: Request, planned: Planned, store: Store) -> None:
        self.store = store
        self._request = request
        self._planned = planned
        self._bound: Bound = {}
        self._execution: Execution | None = None

    def __repr__(self) -> str:
        names = ", ".join(self._work.graph.outputs) or "no outputs"
        state = "bound" if self._execution is not None else "not bound"
        return f"<plan of {names}: {len(self.steps)} steps on {self._places}, {state}>"

    def __str__(self) -> str:
        return plan_text(self._work)

    # -- what it is ---------------------------------------------------------------------------

    @property
    def _work(self) -> Work:
        return self._planned.work

    @property
    def _places(self) -> str:
        return ", ".join(backend.place for backend in self._work.backends)

    @property
    def memory(self) -> Memory:
        """The bytes that it takes, known before any is allocated."""
        return self._planned.memory

    @property
    def inputs(self) -> Mapping[str, Spec]:
        """The inputs' types and sizes, by name."""
        return self._planned.inputs.specs

    @property
    def graph(self) -> Graph:
        """The graph as it runs: expanded, cut by the budget, with transfers between devices."""
        return self._work.graph

    @property
    def splits(self) -> tuple[Split, ...]:
        """Runs of steps of one device, in the order in which they are issued."""
        return self._work.splits

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps of all splits, copies between devices included."""
        return self._work.steps

    @property
    def addresses(self) -> Mapping[Node, Address]:
        """Where each tensor is, once bound."""
        return self._execution.at if self._execution is not None else {}

    @property
    def runners(self) -> tuple[Runner, ...]:
        """What runs each split, once bound: for tools that time a device by its own clock.

        `run()` of a runner puts its steps into the device's queue and does not wait. Inputs keep
        what the last run gave them.
        """
        return tuple(self._execution.runners) if self._execution is not None else ()

    def place_of(self, node: Node) -> str:
        """The place where a node of `graph` is computed or kept."""
        return self._work.home(node).place

    # -- memory -------------------------------------------------------------------------------

    def bind(
        self, arrays: Arrays = None, progress: Progress | None = None, /, **named: object
    ) -> Plan:
        """Allocate, upload weights and make runners. The first run does it if nobody else did.

        arrays, named  arrays that stay these inputs' memory, nothing copied: of NumPy for the host,
                       of CuPy, PyTorch and others for a GPU, in C order and of the tensor's type.
                       The plan keeps them, runs read what is in them then and take no array for
                       those inputs. None goes back to copies. What is not named stays as it is
        progress       called with (bytes that are there, bytes in all) after every weight that
                       goes to a device: `bind({}, show)`
        A store keeps each state where the first plan that was bound has it. A plan that was
        compiled before that, for another place, is planned again here.
        Errors: DeviceError for a place that is only described, OutOfMemoryError with the table;
        UnknownNameError, ShapeError, DTypeError, GraphError for arrays; then none is bound.
        """
        if progress is not None and not callable(progress):
            raise DTypeError(f"bind(arrays, progress): {progress!r} is not a function")
        changes = together(arrays, named)
        self._alone(lambda: self._ready(changes, progress))
        return self

    def _alone(self, action: Callable[[], T]) -> T:
        if self._request.sizes:
            described = ", ".join(map(str, self._request.sizes.values()))
            raise DeviceError(
                f"{described} is a description of a device: compile works on it, bind "
                "and run do not; give the place without a size"
            )
        return self.store.alone(self._work.backends, action)

    def _ready(
        self, changes: Mapping[str, object] | None = None, progress: Progress | None = None
    ) -> Execution:
        """What runs the plan, made again where something it was made for has changed."""
        planned, bound, execution = self._planned, self._bound, self._execution
        if execution is None and not planned.fits(self.store):
            planned = self._request.plan(self.store, stacklevel=6)
        if changes:
            bound = planned.inputs.bind(changes, bound, self.store)
        if execution is None or not execution.serves(planned.work, bound, self.store.arenas):
            execution = self._executable(planned, bound, progress)
            self.store.bound.add(self)
        self._planned, self._bound, self._execution = planned, bound, execution
        return execution

    def _executable(self, planned: Planned, bound: Bound, progress: Progress | None) -> Execution:
        """Runners over memory of the store, all of it allocated and filled."""
        work = planned.work
        used = {need.backend.device for need in planned.needs} | {
            split.backend.device for split in work.splits
        }
        one_a_device = {backend.device: backend for backend in work.backends}
        sizes = {
            backend: work.placed.arenas[device].nbytes
            for device, backend in one_a_device.items()
            if device in used
        }
        given = planned.inputs.addresses(bound)
        try:
            leaves = self.store.reserve(planned.needs, sizes, given, progress)
            arenas = {device: self.store.arenas[device].buffer for device in used}
            execution = Execution(work, addresses(work, leaves, arenas), arenas, bound)
            execution.settle()  # one device may read at once what another still clears or gets
        except OutOfMemoryError as error:
            raise OutOfMemoryError(f"{error}; the plan needs:\n{planned.memory}") from None
        return execution

    def release(self) -> None:
        """Let go of the arenas; the next run binds again."""
        self._execution = None

    # -- runs ---------------------------------------------------------------------------------

    def run(self, inputs: Arrays = None, /, **named: object) -> dict[str, Any]:
        """Give every input an array (NumPy shape), execute, return copies of the outputs by name.

        inputs, named  a dict, keywords, or both. An array of CuPy, PyTorch or others in the memory
                       of a GPU that reads it is copied there, and must have the tensor's type
        bf16 and block types come back as f32. Where a run fails, states that its earlier steps
        wrote stay written.
        Errors: UnknownNameError, ShapeError, DTypeError or GraphError for inputs; DeviceError for a
        device that is not there, only described, or that failed; OutOfMemoryError where the first
        run binds; IdError for ids past the end, on the host. A GPU takes those for negative ones,
        and says so under PYGGML_CUDA_DEBUG=1 only (not inside loops).
        """
        return self._run(inputs, named, 1, self._copy)

    def repeat(self, n: int, inputs: Arrays = None, /, **named: object) -> dict[str, Any]:
        """Execute `n` times, one after another with no host in between; copies of the last
        outputs. Inputs are given once; only states make the runs differ. Errors as for `run`."""
        return self._run(inputs, named, _count("repeat(n)", n), self._copy)

    def views(self, inputs: Arrays = None, /, **named: object) -> dict[str, Any]:
        """As `run`, but outputs are left where they are: not to be written to, and valid until
        the store's next run. They are stored values (raw rows for bf16 and block types), NumPy
        arrays on the host and on a GPU objects that CuPy and PyTorch read."""
        return self._run(inputs, named, 1, self._view)

    def _run(
        self,
        inputs: Arrays,
        named: Mapping[str, object],
        count: int,
        output: Callable[[Execution, Node], Any],
    ) -> dict[str, Any]:
        def run(execution: Execution, give: Callable[[], None]) -> dict[str, Any]:
            execution.run(give, count)
            outputs = execution.work.graph.outputs.items()
            return {key: output(execution, node) for key, node in outputs}

        return self._execute(inputs, named, run)

    def _execute(
        self,
        inputs: Arrays,
        named: Mapping[str, object],
        run: Callable[[Execution, Callable[[], None]], T],
    ) -> T:
        """Bind if need be, and call `run` with what gives the arrays to the devices."""
        taken = self._planned.inputs.take(together(inputs, named))

        def action() -> T:
            execution = self._ready()
            self._planned.inputs.check(taken, self._bound)
            return run(execution, partial(self._give, taken, execution))

        return self._alone(action)

    def _give(self, taken: Ready, execution: Execution) -> None:
        self._planned.inputs.put(taken, self._bound, execution.at)

    def _copy(self, execution: Execution, node: Node) -> Any:
        if node.op is constant_op:  # a device may keep it in a layout of its own
            rows = data_of(node).copy()
        else:
            rows = execution.work.home(node).download(execution.at[node], node.spec)
        return decode_rows(node.dtype, rows) if node.dtype.numpy is None else rows

    def _view(self, execution: Execution, node: Node) -> Any:
        if node.op is constant_op:
            return data_of(node).view()
        return execution.work.home(node).view(execution.at[node], node.spec)

    # -- times --------------------------------------------------------------------------------

    def time(self, inputs: Arrays = None, runs: int = 9, /, **named: object) -> float:
        """Seconds of one run, from giving it to the devices until all are done: the median of
        `runs`, after one that warms up. Inputs are given once and outputs are not copied; every
        run writes states. Errors as for `run`."""
        _count("time(inputs, runs)", runs)

        def run(execution: Execution, give: Callable[[], None]) -> float:
            execution.run(give)
            return median(_seconds(execution.run) for _ in range(runs))

        return self._execute(inputs, named, run)

    def profile(self, inputs: Arrays = None, runs: int = 3, /, **named: object) -> Profile:
        """Time every step (best of `runs`, which write states) beside flops and bytes.

        inputs, named  as for `run`, with the same errors
        """
        _count("profile(inputs, runs)", runs)

        def run(execution: Execution, give: Callable[[], None]) -> list[list[float]]:
            return [execution.timed(give) for _ in range(runs)]

        times = self._execute(inputs, named, run)
        return Profile.of(self.steps, [min(step) for step in zip(*times)])


def _seconds(call: Callable[[], None]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _count(what: str, n: object) -> int:
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise DTypeError(f"{what} takes a whole number of at least 1, not {n!r}")
    return int(n)
