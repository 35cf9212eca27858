"""The memory of a session on given devices, and the largest session that fits, by planning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from pyggml.backends import HOSTS, on_host
from pyggml.errors import BudgetError, OutOfMemoryError
from pyggml.generate.division import expert_bytes, expert_pins, joined, layer_pins
from pyggml.generate.session import Session
from pyggml.models.model import Model
from pyggml.runtime.memory import DeviceMemory, Memory, mib
from pyggml.runtime.places import Place
from pyggml.runtime.plan import Plan
from pyggml.runtime.predict import Prediction

#: Steps of the context, and what `fit` tries for the others.
CTX_STEP = 256
BATCHES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BUDGETS: tuple[float | None, ...] = (256, 512, 1024, 2048, 4096, None)
#: Host memory that `fit` leaves for the results of experts on the host.
HOST_ROOM = 1 << 30


def memory(model: Model, n_ctx: int, n_batch: int) -> Memory:
    """The bytes of a session; see `Session.memory`. Reads no weights."""
    return model.session(n_ctx, n_batch).memory()


@dataclass(frozen=True, slots=True)
class Line:
    """The memory of a session on one device, and what is left of the device.

    driver  an estimate of what the driver uses for itself, and what connects the device with
            others; 0 on the host
    pinned  of the host: memory for copies to and from other devices
    free    what is left of `size`; None without a size
    """

    row: DeviceMemory
    driver: int
    pinned: int

    @property
    def total(self) -> int:
        return self.row.total + self.driver + self.pinned

    @property
    def free(self) -> int | None:
        return None if self.row.size is None else self.row.size - self.total


def lines(memory: Memory, places: Sequence[Place]) -> list[Line]:
    """A line for each device. Pinned memory is the host's, if the host is one of them."""
    drivers = {place.backend.place: place.backend.driver_bytes for place in places}
    pinned = sum(row.staging for row in memory.devices)
    return [
        Line(
            row,
            drivers.get(row.device, 0) + row.connections,
            pinned if row.device in HOSTS else 0,
        )
        for row in memory.devices
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What decides the memory of a session, besides the model and its options.

    amb           attention memory budget in MiB, or None
    host_experts  the experts of this many layers, from the first, are on the host
    """

    n_ctx: int
    n_batch: int
    amb: float | None = None
    host_experts: int = 0


class Planner:
    """Plans sessions of a model on given places.

    places       devices in order; at most one is the host
    pins         come before those that divide the layers
    host_layers  layers that are on the host as a whole
    host         the place in the host's memory, if there is one
    n_plans      plans compiled so far
    """

    def __init__(
        self,
        model: Model,
        places: Sequence[Place],
        pins: Mapping[str, str],
        host_layers: Collection[int] = (),
    ) -> None:
        self.model, self.places, self.host_layers = model, places, host_layers
        self.pins = pins
        self.host = next((place for place in places if place.name in HOSTS), None)
        self.n_plans = 0
        self._memory: dict[Setup, Memory] = {}
        self._last: tuple[Setup, Session] | None = None

    def pins_of(self, setup: Setup) -> dict[str, str]:
        host = self.host.name if self.host is not None else on_host()
        if self.model.shard is not None:
            return joined(self.pins, expert_pins(setup.host_experts, host))
        divided = layer_pins(
            self.model, self.places, n_ctx=setup.n_ctx, n_batch=setup.n_batch,
            host_experts=setup.host_experts, host_layers=self.host_layers,
        )  # fmt: skip
        return joined(self.pins, expert_pins(setup.host_experts, host), divided)

    def session(self, setup: Setup) -> Session:
        model = copy.copy(self.model)
        model.backends, model.amb = tuple(map(str, self.places)), setup.amb
        model.pins = self.pins_of(setup)
        return Session(model, n_ctx=setup.n_ctx, n_batch=setup.n_batch)

    def memory(self, setup: Setup) -> Memory:
        """The memory of a session. Compiles its largest plans, once for each setup."""
        if setup not in self._memory:
            session = self.session(setup)
            self._memory[setup] = session.memory()
            self.n_plans += len(session.plans.largest())
            self._last = setup, session
        return self._memory[setup]

    def times(self, setup: Setup) -> tuple[Prediction, Prediction]:
        """The predicted times of a prompt batch and of one token, over full caches."""
        prompt, decode = self._largest_plans(setup)[:2]
        return prompt.predict(), decode.predict()

    def read_ahead(self, setup: Setup) -> bool | None:
        """Whether a session must be told to read weights of the host ahead, or not to; None: it
        decides the same without knowing the sizes of its devices."""
        if self.model.read_ahead is not None:
            return self.model.read_ahead
        return None if all(plan.read_ahead for plan in self._largest_plans(setup)) else False

    def _largest_plans(self, setup: Setup) -> tuple[Plan, ...]:
        if self._last is None or self._last[0] != setup:
            self._last = setup, self.session(setup)
        return self._last[1].plans.largest()

    def excess(self, setup: Setup) -> int:
        """The bytes by which a session exceeds a device; 0 or less if it fits all of them."""
        with warnings.catch_warnings(action="ignore"):
            memory = self.memory(setup)
        free = [line.free for line in lines(memory, self.places) if line.free is not None]
        return -min(free, default=0)


def fit(
    planner: Planner,
    *,
    n_ctx: int,
    n_batch: int,
    budgets: Sequence[float | None] = BUDGETS,
) -> Setup:
    """The setup with the largest context that fits, then with the largest batch, then with the
    largest attention budget, then with the experts of the fewest layers on the host.

    n_ctx, n_batch  the most to try
    budgets         from the smallest
    OutOfMemoryError if nothing fits.
    """
    best = Setup(n_ctx=n_ctx, n_batch=min(n_batch, n_ctx), amb=budgets[-1])
    if planner.excess(best) <= 0:
        return best
    batches = [b for b in BATCHES if b < best.n_batch] + [best.n_batch]
    setup = replace(
        best, n_batch=batches[0], amb=budgets[0], host_experts=_most_experts(planner, best)
    )
    setup, budgets = _least_budget(planner, setup, budgets)
    setup = _largest_context(planner, setup)

    sizes = [b for b in batches if b <= setup.n_ctx] or [setup.n_ctx]
    setup = _last(planner, [replace(setup, n_batch=n) for n in sizes])
    setup = _last(planner, [replace(setup, amb=amb) for amb in budgets])
    counts = range(setup.host_experts, -1, -1)
    return _last(planner, [replace(setup, host_experts=n) for n in counts])


def _fits(planner: Planner, setup: Setup) -> bool:
    try:
        return planner.excess(setup) <= 0
    except BudgetError:
        return False


def _most_experts(planner: Planner, setup: Setup) -> int:
    """How many layers' experts the host can take, in the layout in which it holds them."""
    host, n_layer = planner.host, planner.model.arch.n_layer
    if host is None or len(planner.places) == 1 or not sum(expert_bytes(planner.model)):
        return 0

    def fits(n: int) -> bool:
        with warnings.catch_warnings(action="ignore"):
            memory = planner.memory(replace(setup, amb=None, host_experts=n))
        weights = sum(row.weights for row in memory.devices if row.device in HOSTS)
        return host.size is None or weights <= host.size - HOST_ROOM

    return _largest(n_layer, fits)


def _least_budget(
    planner: Planner, setup: Setup, budgets: Sequence[float | None]
) -> tuple[Setup, Sequence[float | None]]:
    """The setup with the smallest budget that can be kept, and the budgets from there."""
    try:
        planner.excess(setup)
    except BudgetError as error:
        if len(budgets) == 1:
            raise
        least = float(ceil(error.least))
        larger = [b for b in budgets if b is None or b > least]
        return replace(setup, amb=least), [least, *larger]
    return setup, budgets


def _largest_context(planner: Planner, setup: Setup) -> Setup:
    """Memory grows almost in proportion to the context, so interpolation beats bisection."""
    low, high = min(CTX_STEP, setup.n_ctx), setup.n_ctx
    over = planner.excess(setup)
    if over <= 0:
        return setup
    smallest = replace(setup, n_ctx=low, n_batch=min(setup.n_batch, low))
    under = planner.excess(smallest)
    if under > 0:
        raise OutOfMemoryError(
            f"a session of {low} tokens in batches of {smallest.n_batch} does not fit: "
            f"{mib(under)} MiB too much on one device, even with the experts of "
            f"{setup.host_experts} layers on the host"
        )
    while high - low > CTX_STEP:
        share = under / (under - over)
        middle = low + int((high - low) * share) // CTX_STEP * CTX_STEP
        middle = min(max(middle, low + CTX_STEP), (high - 1) // CTX_STEP * CTX_STEP)
        excess = planner.excess(replace(setup, n_ctx=middle))
        if excess <= 0:
            low, under = middle, excess
        else:
            high, over = middle, excess
    return replace(setup, n_ctx=low)


def _last(planner: Planner, setups: Sequence[Setup]) -> Setup:
    """The last setup that fits, by bisection; the first one is known to."""
    return setups[_largest(len(setups) - 1, lambda n: _fits(planner, setups[n]))]


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, by bisection; 0 does in any case."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
