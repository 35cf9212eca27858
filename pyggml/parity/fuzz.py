"""Random cases and graphs for so many seconds; what fails is made smaller and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic

from pyggml.parity.fuzz_cases import OPS, random_case
from pyggml.parity.fuzz_graphs import random_graph
from pyggml.parity.running import Outcome
from pyggml.parity.shrink import shrunk, way
from pyggml.parity.worker import CHUNK, Pool, Setup

#: Seconds for making one failure smaller, beside those for running cases; failures made smaller.
SHRINKING, KINDS = 20.0, 12
#: Graphs that a process takes at a time: each takes as long as many cases.
GRAPHS = 2


@dataclass(frozen=True, slots=True)
class Failure:
    """A failing case as it was met, and made small.

    number  of the case in the sequence of its seed
    """

    number: int
    case: str
    small: str
    why: str


@dataclass(slots=True)
class Tally:
    """What a run of the fuzzer met."""

    cases: int = 0
    unsupported: int = 0
    failed: int = 0
    deaths: int = 0
    seconds: float = 0.0
    ops: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)


def fuzz(
    setup: Setup,
    seconds: float,
    seed: int = 0,
    graphs: bool = False,
    jobs: int = 1,
    most: int | None = None,
    draw: Callable[[int], str] | None = None,
    told: Callable[[Failure], None] = lambda failure: None,
) -> Tally:
    """Run cases 0, 1, .. of a seed until the time is over (or so many have run).

    draw  the text of the case of a number, in place of the usual ones
    told  is called with the first failure of each kind, made small
    The same seed makes the same cases; how many run depends on the machine.
    """
    tally, start = Tally(), monotonic()
    aside = 0.0  # seconds that went into making failures smaller
    draw = draw or drawn(setup, seed, graphs)
    chunk = GRAPHS if graphs else CHUNK
    with Pool(setup, jobs, chunk) as pool:
        number = 0
        while monotonic() - start - aside < seconds and (most is None or number < most):
            count = chunk * jobs if most is None else min(chunk * jobs, most - number)
            texts = [draw(number + i) for i in range(count)]
            for at, outcome in enumerate(pool.run(texts)):
                _count(tally, outcome)
                kind = _kind(outcome)
                if outcome.status == "fail" and tally.kinds[kind] == 1:
                    began = monotonic()
                    failure = _small(setup, number + at, outcome, len(tally.failures) < KINDS)
                    tally.failures.append(failure)
                    told(failure)
                    aside += monotonic() - began
                if monotonic() - start - aside > seconds:
                    break
            number += count
        tally.deaths = pool.deaths
    tally.seconds = monotonic() - start - aside
    return tally


def drawn(setup: Setup, seed: int, graphs: bool) -> Callable[[int], str]:
    """The text of the case of a number."""
    if graphs:
        return lambda number: str(random_graph(seed, number, setup.backend))
    ops = setup.ops & OPS or OPS
    return lambda number: str(random_case(seed, number, ops))


def _kind(outcome: Outcome) -> str:
    """What failures of one cause have in common."""
    op = "" if ";" in outcome.case else outcome.case.partition("(")[0]
    return f"{op} {way(outcome.why)}"


def _count(tally: Tally, outcome: Outcome) -> None:
    tally.cases += 1
    tally.unsupported += outcome.status == "unsupported"
    if outcome.status == "fail":
        tally.failed += 1
        tally.kinds[_kind(outcome)] += 1
    tally.ops.update(_ops(outcome.case))


def _ops(text: str) -> Iterator[str]:
    for part in text.split("; "):
        call = part.partition("(")[0]
        name = call.rpartition("=")[2].removesuffix(".means")
        if "(" in part and name not in ("plan", "state"):
            yield name


def _small(setup: Setup, number: int, outcome: Outcome, shrink: bool) -> Failure:
    """The failure made small, in a process of its own: the trials may die as the case did."""
    if not shrink:
        return Failure(number, outcome.case, outcome.case, outcome.why)
    end = monotonic() + SHRINKING
    with Pool(setup) as pool:

        def run(text: str) -> str | None:
            if not text or monotonic() > end:
                return None
            (tried,) = pool.run([text])
            return str(tried.why) if tried.status == "fail" else None

        small, why = shrunk(outcome.case, outcome.why, run)
    return Failure(number, outcome.case, small, why)
