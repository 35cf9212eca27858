"""Plan: a compiled graph, ready to run many times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Integral
from os import PathLike
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

from pyggml.backends.base import Kernels, Runner
from pyggml.backends.step import Address, Step
from pyggml.errors import DeviceError, DTypeError, OutOfMemoryError
from pyggml.graph import Graph
from pyggml.node import Node
from pyggml.passes.work import Split, Work
from pyggml.runtime.connections import connect
from pyggml.runtime.exchange import Exchange
from pyggml.runtime.execution import Execution, addresses
from pyggml.runtime.inputs import Bound, Ready, Shared, together
from pyggml.runtime.kernels import kernels_of
from pyggml.runtime.leaves import Need, Progress
from pyggml.runtime.memory import Memory
from pyggml.runtime.outputs import names_of
from pyggml.runtime.planned import Planned, Request
from pyggml.runtime.predict import Prediction, Rates, predict
from pyggml.runtime.profile import Profile
from pyggml.runtime.profiling import measure
from pyggml.runtime.report import plan_text
from pyggml.runtime.store import Store
from pyggml.runtime.submitted import Submitted
from pyggml.spec import Spec
from pyggml.words import counted

T = TypeVar("T")
Arrays = Mapping[str, object] | None
Names = Iterable[str] | None


class Plan:
    """A graph compiled for a store. `compile` makes it; it has no device memory before `bind`.

    An interrupt leaves each of `_planned`, `_bound` and `_execution` either old or new, because one
    assignment replaces it. `_ready` checks that the three belong together.
    """

    def __init__(self, request: Request, planned: Planned, store: Store) -> None:
        self.store = store
        self._request = request
        self._planned = planned
        self._bound: Bound = {}
        self._execution: Execution | None = None
        self._agreed: Work | None = None  # what all ranks have

    def __repr__(self) -> str:
        names = ", ".join(self._work.graph.outputs) or "no outputs"
        state = "bound" if self._execution is not None else "not bound"
        return f"<plan of {names}: {counted(len(self.steps), 'step')} on {self._places}, {state}>"

    def __str__(self) -> str:
        return plan_text(self._work)

    # -- contents -----------------------------------------------------------------------------

    @property
    def _work(self) -> Work:
        return self._planned.work

    @property
    def _places(self) -> str:
        return ", ".join(backend.place for backend in self._work.backends)

    @property
    def memory(self) -> Memory:
        """The bytes that the plan uses, known before anything is allocated."""
        return self._planned.memory

    @property
    def read_ahead(self) -> bool:
        """Whether devices may read weights of the host ahead (`compile`)."""
        return self._work.read_ahead

    def predict(self, rates: Rates | None = None) -> Prediction:
        """The seconds of a run by the cost rules of its ops: a prediction. Needs no device."""
        return predict(self._work, rates)

    def memory_with(self, *others: Plan) -> Memory:
        """The bytes that this plan and other plans of its store use together."""
        plans = (self, *others)
        return Memory.joint([(p.memory, p._planned.needs) for p in plans])

    @property
    def needs(self) -> tuple[Need, ...]:
        """The leaves that the plan reads: weights, states and inputs, once for each device."""
        return tuple(self._planned.needs)

    @property
    def inputs(self) -> Mapping[str, Spec]:
        """The types and sizes of the inputs, by name."""
        return self._planned.inputs.specs

    @property
    def graph(self) -> Graph:
        """The graph that runs: ops expanded, attentions cut by the budget, transfers inserted."""
        return self._work.graph

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits: consecutive steps on one device, in the order in which they are issued."""
        return self._work.splits

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of all splits, including copies between devices."""
        return self._work.steps

    @property
    def addresses(self) -> Mapping[Node, Address]:
        """The address of each tensor; empty before `bind`."""
        return self._execution.at if self._execution is not None else {}

    @property
    def runners(self) -> tuple[Runner, ...]:
        """The runner of each split, empty before `bind`; for tools that time with device clocks.

        A runner's `run()` puts its steps into the device's queue and does not wait. Inputs keep the
        values of the last run.
        """
        return tuple(self._execution.runners) if self._execution is not None else ()

    @property
    def execution(self) -> Execution | None:
        """The splits bound to memory: another object whenever that has changed. None before `bind`,
        and if the store needs a larger arena; the next run binds again."""
        return self._execution

    def kernels(self) -> list[Kernels]:
        """The kernels of each of `steps`, and why a step does not take a fast one.

        Once the plan is bound, they are those that its runs start. Before that no device is needed,
        and a loop has the kernels of the first piece of each body.
        """
        return kernels_of(self._work, () if self.store.ranks else self.runners)

    def place_of(self, node: Node) -> str:
        """The place where a node of `graph` is computed or stored."""
        return self._work.home(node).place

    # -- memory -------------------------------------------------------------------------------

    def bind(
        self, arrays: Arrays = None, progress: Progress | None = None, /, **named: object
    ) -> Plan:
        """Allocate memory, upload weights and build runners. The first run does it if needed.

        arrays, named  arrays that become the memory of these inputs, without a copy: NumPy arrays
                       for the host, arrays of CuPy, PyTorch and others for a GPU, in C order and of
                       the tensor's type. Runs read them and take no array for these inputs; the
                       plan keeps them alive. None unbinds an input; other inputs do not change
        progress       called as progress(uploaded bytes, total bytes) after each weight:
                       `bind({}, show)`
        A store keeps each state on the device of the first plan that was bound. A plan compiled
        earlier for another place is planned again here.
        Errors: DeviceError for a place with a size; OutOfMemoryError with the memory table;
        UnknownNameError, ShapeError, DTypeError or GraphError for arrays, and then no array is
        bound.
        """
        if progress is not None and not callable(progress):
            raise DTypeError(f"bind(arrays, progress): {progress!r} is not a function")
        changes = together(arrays, named)
        self._alone(lambda: self._ready(changes, progress))
        return self

    def _alone(self, action: Callable[[], T]) -> T:
        if self._request.sizes:
            names = ", ".join(map(str, self._request.sizes.values()))
            raise DeviceError(
                f"{names}: a place with a size is for planning only; compile for the place without "
                "the size to bind or run"
            )
        return self.store.alone(self._planned.backends, action)

    def _ready(
        self, changes: Mapping[str, object] | None = None, progress: Progress | None = None
    ) -> Execution:
        """The execution, rebuilt if the store, the arenas or the bound arrays have changed."""
        planned, bound, execution = self._planned, self._bound, self._execution
        if execution is None and not planned.fits(self.store):
            planned = self._request.plan(self.store)
        if changes:
            bound = planned.inputs.bind(changes, bound, self.store)
        if execution is None or not execution.serves(planned.work, bound, self.store.shared.arenas):
            execution = self._executable(planned, bound, progress)
            self.store.bound.add(self)
        self._planned, self._bound, self._execution = planned, bound, execution
        return execution

    def _executable(self, planned: Planned, bound: Bound, progress: Progress | None) -> Execution:
        """An execution over the store's memory, all of it allocated and filled.

        The first time, ranks compare the plan, and if one of them fails here, all do.
        """
        ranks, work = self.store.ranks, planned.work
        build = partial(self._built, planned, bound, progress)
        if ranks is None:
            connect(work)
            return build()
        if self._agreed is work:
            return build()
        ranks.agree("plan", plan_text(work))
        ranks.adopt(work.shard)
        connect(work, ranks)
        execution = ranks.together(build)
        self._agreed = work
        return execution

    def _built(self, planned: Planned, bound: Bound, progress: Progress | None) -> Execution:
        work, sizes, ranks = planned.work, planned.arena_sizes(), self.store.ranks
        bound_at = planned.inputs.addresses(bound)
        try:
            leaves = self.store.reserve(planned.needs, sizes, bound_at, progress)
            arenas = {b.device: self.store.arenas[b.device].buffer for b in sizes}
            at = addresses(work, leaves, arenas, planned.owns)
            exchange = None if ranks is None else Exchange(work, at, ranks)
            execution = Execution(work, at, arenas, bound, planned.inputs, exchange)
            execution.settle()  # another device may read memory that is still being filled
        except OutOfMemoryError as error:
            raise OutOfMemoryError(f"{error}; the plan needs:\n{planned.memory}") from None
        return execution

    def reserve(self) -> None:
        """Make the store's arenas large enough for this plan, and allocate nothing else.

        A larger arena makes all bound plans bind again. So reserve for the largest plan first.
        Errors: DeviceError for a place with a size; OutOfMemoryError with the memory table.
        """

        def action() -> None:
            try:
                self.store.reserve((), self._planned.arena_sizes(), {})
            except OutOfMemoryError as error:
                raise OutOfMemoryError(f"{error}; the plan needs:\n{self.memory}") from None

        ranks = self.store.ranks
        self._alone(action if ranks is None else partial(ranks.together, action))

    def release(self) -> None:
        """Free the arenas; the next run binds again."""
        self._execution = None

    # -- runs ---------------------------------------------------------------------------------

    def run(
        self, inputs: Arrays = None, outputs: Names = None, /, **named: object
    ) -> dict[str, Any]:
        """Run the graph on `inputs` (NumPy shapes) and return copies of the outputs by name.

        inputs, named  a dict, keywords, or both: an array for every input that is not bound. An
                       array of CuPy, PyTorch or others in the memory of a GPU that reads it is
                       copied on the GPU, and must have the tensor's type
        outputs        the names of the outputs to copy; default: all
        bf16 and block types are returned as f32. If a run fails, states keep what its steps wrote
        before the failure.
        Errors: UnknownNameError, ShapeError, DTypeError or GraphError for inputs and outputs;
        DeviceError for a device that is missing, has failed, or was given a size; OutOfMemoryError
        when the first run binds; IdError for ids past the end, on the host (on a GPU see
        `get_rows`). The error of a run that was submitted before, if nothing has waited for it.
        """
        return self._run(inputs, outputs, named, 1)

    def repeat(
        self, n: int, inputs: Arrays = None, outputs: Names = None, /, **named: object
    ) -> dict[str, Any]:
        """Run `n` times without returning to the host in between; copies of the last outputs.

        Inputs are uploaded once, so runs differ only by states. Errors as for `run`.
        """
        return self._run(inputs, outputs, named, _count("repeat(n)", n))

    def views(
        self, inputs: Arrays = None, outputs: Names = None, /, **named: object
    ) -> dict[str, Any]:
        """Like `run`, but return views of the outputs' memory, without copies.

        Do not write to them. They are valid until the store's next run. On the host they are NumPy
        arrays, on a GPU objects that CuPy and PyTorch read. They show stored values: raw rows for
        bf16 and block types.
        """
        names = self._names(outputs)

        def run(execution: Execution, give: Callable[[], None]) -> dict[str, Any]:
            execution.run(give)
            return {name: execution.outputs.view(name) for name in names}

        return self._execute(inputs, named, run)

    def submit(self, inputs: Arrays = None, outputs: Names = None, /, **named: object) -> Submitted:
        """Queue a run and return without waiting for it; `result()` of what it returns waits.

        Arrays of the host may change as soon as this returns; those in a GPU's memory must stay as
        they are until the run is over. Later runs of the store come after it, and so does all that
        reads or writes its states. A plan that also uses the host waits where the host reads what
        a device computes.
        Errors: those of `run`. An error of a device is raised by the first call that waits for it,
        and by `result()`; runs that were queued behind it are lost and raise it, too.
        """
        names = self._names(outputs)
        ready = self._taken(inputs, named)

        def action() -> Submitted:
            execution = self._checked(ready)
            self.store.shared.queued |= frozenset(execution.backends)
            copies = execution.submit(partial(self._give, ready, execution), names)
            return Submitted(self.store, execution, copies, ready)

        return self._alone(action)

    def _names(self, outputs: Names) -> tuple[str, ...]:
        return names_of(outputs, self._work.graph.outputs)

    def _run(
        self, inputs: Arrays, outputs: Names, named: Mapping[str, object], count: int
    ) -> dict[str, Any]:
        names, ready = self._names(outputs), self._taken(inputs, named)

        def action() -> dict[str, Any]:
            execution, shared = self._checked(ready), self.store.shared
            arrays = [array for array in ready.values() if not isinstance(array, Shared)]
            if len(arrays) == len(ready) and not self._bound and not shared.queued:
                whole = execution.whole(tuple(ready), names)
                if whole is not None:
                    return execution.run_whole(whole, arrays, count, names)
            copies = execution.run(partial(self._give, ready, execution), count, names)
            results = {name: copy() for name, copy in copies.items()}
            shared.queued = frozenset()
            return results

        return self._alone(action)

    def _execute(
        self,
        inputs: Arrays,
        named: Mapping[str, object],
        run: Callable[[Execution, Callable[[], None]], T],
    ) -> T:
        """Bind if needed, then call `run` with a function that uploads the inputs. It waits for
        the end of the run, and so for all that was submitted before."""
        ready = self._taken(inputs, named)

        def action() -> T:
            execution = self._checked(ready)
            result = run(execution, partial(self._give, ready, execution))
            self.store.shared.queued = frozenset()
            return result

        return self._alone(action)

    def _taken(self, inputs: Arrays, named: Mapping[str, object]) -> Ready:
        return self._planned.inputs.take(together(inputs, named))

    def _checked(self, ready: Ready) -> Execution:
        """The execution, if these arrays and the bound ones are all that it needs."""
        execution = self._ready()
        if self._bound or len(ready) < len(self._planned.inputs.specs):
            self._planned.inputs.check(ready, self._bound)
        return execution

    def _give(self, ready: Ready, execution: Execution) -> None:
        queued = self.store.shared.queued
        if queued and len(queued.union(execution.backends)) > 1:
            execution.follow(queued)
        execution.slots.fill(ready, self._bound)

    # -- times --------------------------------------------------------------------------------

    def time(self, inputs: Arrays = None, runs: int = 9, /, **named: object) -> float:
        """The median seconds of `runs` runs after a warm-up, from issuing to the devices' end.

        Inputs are uploaded once and outputs are not copied. Every run writes states. Errors as for
        `run`.
        """
        _count("time(inputs, runs)", runs)

        def run(execution: Execution, give: Callable[[], None]) -> float:
            execution.run(give)
            return median(_seconds(execution.run) for _ in range(runs))

        return self._execute(inputs, named, run)

    def profile(self, inputs: Arrays = None, runs: int = 5, /, **named: object) -> Profile:
        """The time of every step inside a run, with its bytes, flops and kernels.

        runs  how many samples of each step; on a GPU each takes 19 runs, which see different steps
              (`backends/cuda/stamps.py`)
        All runs are complete runs, so each writes states. Inputs and errors are those of `run`. In
        several processes all call it, and get the times of all.
        """
        _count("profile(inputs, runs)", runs)

        def run(execution: Execution, give: Callable[[], None]) -> Profile:
            try:
                return measure(execution, give, runs)
            except BaseException as error:
                if self.store.ranks is not None:
                    self.store.ranks.failed(error)
                raise

        return self._execute(inputs, named, run)

    # -- pages --------------------------------------------------------------------------------

    def page(
        self,
        path: str | PathLike[str],
        *,
        profile: Profile | Mapping[Step, float] | None = None,
        title: str = "",
    ) -> Path:
        """Write one HTML file about this plan, for a browser without a network; return its path.

        It shows the graph by layer, with the kernel and the line of every step; what is in memory
        in each step; copies between devices; and what other attention budgets would change.

        profile  `plan.profile(..)`, or the seconds of each step: adds times
        title    default: the outputs
        Errors: PyggmlError for the profile of another plan; OSError.
        """
        from pyggml.page.document import Document, View
        from pyggml.page.html import write
        from pyggml.page.variants import by_budget

        target = Path(path)
        document = Document(
            title=title or ", ".join(self.graph.outputs) or "a plan without outputs",
            views=[View(self._places, self, profile)],
            memory=self.memory,
            about=[self._places],
            variants=list(by_budget(self)),
        )
        write(target, document)
        return target

    def _repr_html_(self) -> str:
        """For notebooks: memory and steps, repeated layers once."""
        from pyggml.page.snippets import plan_html

        return plan_html(self)


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _count(what: str, n: object) -> int:
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise DTypeError(f"{what} needs a whole number of at least 1, not {n!r}")
    return int(n)
