"""Run random cases or graphs for some seconds; shrink and report those that fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic

from pyggml.parity.fuzz_cases import OPS, random_case
from pyggml.parity.fuzz_graphs import random_graph
from pyggml.parity.running import Outcome
from pyggml.parity.shrink import kind_of, shrunk
from pyggml.parity.worker import CHUNK, Pool, Setup

#: Seconds that shrinking one failure may take (they do not count as running time), and how many
#: failures are shrunk.
SHRINKING, KINDS = 20.0, 12
#: Graphs that a process takes at a time. A graph takes as long as many cases.
GRAPHS = 2


@dataclass(frozen=True, slots=True)
class Failure:
    """A failing case, and its shrunk form.

    number  the case's position in the sequence of its seed
    """

    number: int
    case: str
    small: str
    why: str


@dataclass(slots=True)
class Tally:
    """Counts and failures of one run of the fuzzer."""

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
    report: Callable[[Failure], None] = lambda failure: None,
) -> Tally:
    """Run cases 0, 1, .. of a seed for `seconds`, or until `most` have run.

    draw    number -> text of the case; the seed's own by default
    report  called with the first failure of each kind, shrunk

    The same seed draws the same cases; how many of them run depends on the machine.
    """
    tally, start = Tally(), monotonic()
    shrinking = 0.0  # seconds spent on shrinking failures
    draw = draw or sequence(setup, seed, graphs)
    chunk = GRAPHS if graphs else CHUNK
    with Pool(setup, jobs, chunk) as pool:
        number = 0
        while monotonic() - start - shrinking < seconds and (most is None or number < most):
            count = chunk * jobs if most is None else min(chunk * jobs, most - number)
            texts = [draw(number + i) for i in range(count)]
            for at, outcome in enumerate(pool.run(texts)):
                _count(tally, outcome)
                kind = _kind(outcome)
                if outcome.status == "fail" and tally.kinds[kind] == 1:
                    before = monotonic()
                    failure = _small(setup, number + at, outcome, len(tally.failures) < KINDS)
                    tally.failures.append(failure)
                    report(failure)
                    shrinking += monotonic() - before
                if monotonic() - start - shrinking > seconds:
                    break
            number += count
        tally.deaths = pool.deaths
    tally.seconds = monotonic() - start - shrinking
    return tally


def sequence(setup: Setup, seed: int, graphs: bool) -> Callable[[int], str]:
    """A seed's cases: number -> text."""
    if graphs:
        return lambda number: str(random_graph(seed, number, setup.backend))
    ops = setup.ops & OPS or OPS
    return lambda number: str(random_case(seed, number, ops))


def _kind(outcome: Outcome) -> str:
    """What failures with one cause have in common: the op, and the reason without its numbers."""
    op = "" if ";" in outcome.case else outcome.case.partition("(")[0]
    return f"{op} {kind_of(outcome.why)}"


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
    """The failure, shrunk in a new process: a trial may kill its process as the case did."""
    if not shrink:
        return Failure(number, outcome.case, outcome.case, outcome.why)
    end = monotonic() + SHRINKING
    with Pool(setup) as pool:

        def run(text: str) -> str | None:
            if not text or monotonic() > end:
                return None
            (trial,) = pool.run([text])
            return str(trial.why) if trial.status == "fail" else None

        small, why = shrunk(outcome.case, outcome.why, run)
    return Failure(number, outcome.case, small, why)
