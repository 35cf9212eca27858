"""The cut over several devices that fits and is fastest, by planning alone.

Every cut of all devices is planned with a few layers (sampled.py). Of those that fit with the
largest context and batch, the one with the shortest predicted time wins. If none does, the cuts
that lack the least memory are searched for the largest setup that fits, as for one device (fit.py).
The winner is then planned with all layers. If an estimate was too small, the search goes on with
the difference added.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import product

from pyggml.errors import OutOfMemoryError, PyggmlError
from pyggml.generate.division import expert_bytes
from pyggml.generate.fit import Planner, Setup, fit
from pyggml.generate.sampled import Sampled
from pyggml.models.model import Model
from pyggml.runtime.memory import mib
from pyggml.runtime.places import Place
from pyggml.runtime.shards import Cuts, shard_of, shard_text

#: The tokens of the prompt and of the answer whose predicted time decides between cuts: the tests
#: that `pyggml bench` runs by default.
PROMPT, ANSWER = 512, 128
#: How many cuts are searched if none fits with the largest context and batch.
SEARCHED = 3
#: How often a cut is searched again because an exact plan did not fit.
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Trial:
    """A cut that was tried; figures are estimates from a few layers.

    setup          with which it fits; None if it does not
    missing        bytes that a device lacks, with `setup` or the largest one; 0 or less if it fits
    prompt, token  predicted seconds of a batch of a prompt, and of a token, over full caches
    why            why the cut cannot be made, or why it was not planned
    """

    cuts: Cuts
    setup: Setup | None = None
    missing: int = 0
    prompt: float = 0.0
    token: float = 0.0
    why: str = ""

    @property
    def seconds(self) -> float:
        """The predicted time of PROMPT and ANSWER tokens."""
        n_batch = PROMPT if self.setup is None else self.setup.n_batch
        return PROMPT / n_batch * self.prompt + ANSWER * self.token


@dataclass(frozen=True, slots=True)
class Winner:
    """The result of a search: the winner with exact memory, and what was tried, best first."""

    planner: Planner
    setup: Setup
    trials: tuple[Trial, ...]


def candidates(model: Model, n: int) -> Iterator[dict[str, int]]:
    """The cuts over `n` devices: stages of equal groups of them, and how each group divides
    attention, experts and other products."""
    attentions = ("heads", "sequence", "") if model.options.flash else ("heads", "")
    experts = ("experts", "") if sum(expert_bytes(model)) else ("",)
    for n_group in (k for k in range(n, 0, -1) if n % k == 0):
        stages = {} if n_group == n else {"layers": n // n_group}
        if n_group == 1:
            yield stages
            continue
        for names in product(attentions, experts, ("rows", "")):
            inner = dict.fromkeys(filter(None, names), n_group)
            if inner:
                yield stages | inner


class Search:
    """A search over cuts of a model on given places.

    arguments as for `Planner`, and those of `fit`
    """

    def __init__(
        self,
        model: Model,
        places: Sequence[Place],
        pins: Mapping[str, str],
        host_layers: Collection[int],
        *,
        n_ctx: int,
        n_batch: int,
        budgets: Sequence[float | None],
    ) -> None:
        self.model, self.places, self.pins, self.host_layers = model, places, pins, host_layers
        self.n_ctx, self.n_batch, self.budgets = n_ctx, n_batch, budgets
        self.best = Setup(n_ctx=n_ctx, n_batch=min(n_batch, n_ctx), amb=budgets[-1])
        self.devices = [place for place in places if place.name == places[0].name]
        self._planners: dict[str, Sampled] = {}

    def run(self, cuts: Sequence[Cuts]) -> Winner:
        """Try these cuts. Errors: OutOfMemoryError if none fits, those of a cut if it is alone."""
        trials = [self._first(each) for each in cuts]
        fitting = [trial for trial in trials if trial.setup is not None]
        fitting += [t for t in map(self._evenly, _ranked(fitting)[:2]) if t.setup is not None]
        if not fitting:
            known = sorted((t for t in trials if not t.why), key=lambda t: t.missing)
            fitting = [t for t in map(self._searched, known[:SEARCHED]) if t.setup is not None]
        for trial in _ranked(fitting):
            exact = self._confirmed(trial)
            if exact is not None:
                won = replace(trial, setup=exact[1])
                others = [t for t in fitting if t is not trial]
                rest = [t for t in trials if t.cuts not in [f.cuts for f in fitting]]
                rest.sort(key=lambda t: (bool(t.why), t.missing))
                return Winner(*exact, (won, *_ranked(others), *rest))
        raise OutOfMemoryError(_reason(trials))

    # -- one cut ------------------------------------------------------------------------------

    def _planner(self, cuts: Cuts) -> Sampled:
        key = shard_text(cuts)
        if key not in self._planners:
            self._planners[key] = Sampled(
                self.model, self.places, self.pins, self.host_layers, cuts
            )
        return self._planners[key]

    def _first(self, cuts: Cuts) -> Trial:
        """A cut with the largest context and batch."""
        least = self._least(cuts)
        sizes = [place.size for place in self.devices if place.size is not None]
        on_host = len(self.places) > len(self.devices)
        if len(sizes) == len(self.devices) and least > max(sizes) and not on_host:
            missing = int(least) - max(sizes)
            return Trial(cuts, missing=missing, why="its weights alone are too large")
        try:
            planner = self._planner(cuts)
            missing = planner.excess(self.best)
        except PyggmlError as error:
            return Trial(cuts, why=str(error).partition("\n")[0])
        return self._trial(cuts, self.best, missing)

    def _trial(self, cuts: Cuts, setup: Setup, missing: int) -> Trial:
        prompt, token = self._planner(cuts).times(setup)
        return Trial(cuts, setup if missing <= 0 else None, missing, prompt.total, token.total)

    def _least(self, cuts: Cuts) -> float:
        """A lower bound of the weights on the device that has most, by their bytes in the file."""
        shard = shard_of(cuts, self.places)
        n_group, n_stages = (1, 1) if shard is None else (len(shard.shares), len(shard.stages))
        experts = sum(expert_bytes(self.model))
        rest = sum(t.nbytes for t in self.model.file.tensors.values()) - experts
        if cuts == "auto" or "experts" in cuts:
            experts //= n_group
        return (rest / n_group + experts) / n_stages

    def _evenly(self, trial: Trial) -> Trial:
        """A cut that fits, in equal parts instead of parts in proportion to the devices' sizes."""
        shard = shard_of(trial.cuts, self.places)
        if shard is None or isinstance(trial.cuts, str) or len(set(shard.shares)) == 1:
            return Trial(trial.cuts)
        cuts = {
            name: shard.stages if name == "layers" else (1.0,) * len(shard.shares)
            for name in trial.cuts
        }
        return self._first(cuts)

    def _searched(self, trial: Trial) -> Trial:
        """The largest setup of a cut that does not fit with the largest."""
        planner = self._planner(trial.cuts)
        try:
            setup = fit(planner, n_ctx=self.n_ctx, n_batch=self.n_batch, budgets=self.budgets)
        except PyggmlError:
            return trial
        return self._trial(trial.cuts, setup, planner.excess(setup))

    def _confirmed(self, trial: Trial) -> tuple[Planner, Setup] | None:
        """A planner of all layers, and a setup that fits by it."""
        sampled, setup = self._planner(trial.cuts), trial.setup
        model = copy(self.model)
        model.shard = trial.cuts
        planner = Planner(model, self.places, self.pins, self.host_layers)
        for _ in range(ROUNDS):
            assert setup is not None
            excess = planner.excess(setup)
            if excess <= 0:
                return planner, setup
            sampled.slack += max(excess - sampled.excess(setup), 1)
            try:
                setup = fit(sampled, n_ctx=self.n_ctx, n_batch=self.n_batch, budgets=self.budgets)
            except PyggmlError:
                return None
        return None


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The largest context first, then the shortest time, then the fewest cuts."""
    return sorted(
        trials, key=lambda t: (-(t.setup.n_ctx if t.setup else 0), t.seconds, len(t.cuts))
    )


def _reason(trials: Sequence[Trial]) -> str:
    """Why there is no winner."""
    made = [trial for trial in trials if trial.missing > 0]
    if not made:
        return "; ".join(dict.fromkeys(trial.why for trial in trials))
    planned = [trial for trial in made if not trial.why]
    if not planned:
        least = mib(min(trial.missing for trial in made))
        return f"no cut fits: the weights alone are at least {least} MiB too much for one device"
    best = min(planned, key=lambda trial: trial.missing)
    return (
        f"no cut fits; {shard_text(best.cuts)} needs the least, with {mib(best.missing)} MiB too "
        "much on one device"
    )
