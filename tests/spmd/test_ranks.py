"""What ranks tell each other apart from the copies of a plan."""

from __future__ import annotations

import time

import pytest

from pyggml.errors import DeviceError
from pyggml.runtime import ranks as module
from pyggml.runtime.ranks import PeerError, Ranks
from tests.spmd.threads import every, ranks_of, results


def test_gather() -> None:
    texts = ["", "a", "ß" * 5000]
    found = every([lambda r=r, t=t: r.gather(t) for r, t in zip(ranks_of(3), texts)])
    assert found == [texts] * 3


def test_agree() -> None:
    every([lambda r=r: r.agree("plan", "x\ny") for r in ranks_of(3)])
    ranks = ranks_of(3)
    found = results([lambda r=r: r.agree("plan", f"x\ny{r.rank == 2}\nz") for r in ranks])
    assert {str(error) for error in found} == {
        "rank 2 has another plan than rank 0: 'yTrue' instead of 'yFalse'; all ranks need the same "
        "version, file and options"
    }
    # One compares something else, or has less.
    ranks = ranks_of(2)
    found = results([lambda r=r: r.agree(f"plan {r.rank}", "x") for r in ranks])
    assert "'plan 1' instead of 'plan 0'" in str(found[0])
    found = results([lambda r=r: r.agree("plan", "x\ny"[: 3 - 2 * r.rank]) for r in ranks_of(2)])
    assert "'' instead of 'y'" in str(found[1])


def test_together() -> None:
    ranks = ranks_of(3)
    assert every([lambda r=r: r.together(lambda: r.rank) for r in ranks]) == [0, 1, 2]

    def fails(r: Ranks) -> int:
        return 1 // (r.rank - 1)

    found = results([lambda r=r: r.together(lambda: fails(r)) for r in ranks])
    assert isinstance(found[1], ZeroDivisionError)
    assert str(found[0]) == str(found[2]) == f"rank 1: ZeroDivisionError: {found[1]}"
    assert every([lambda r=r: r.gather("on") for r in ranks]) == [["on"] * 3] * 3


def test_an_error_reaches_a_rank_that_waits() -> None:
    first, second = ranks_of(2)
    start = time.monotonic()

    def fail() -> None:
        time.sleep(0.1)
        second.failed(DeviceError("gone\nwith a table"))

    found = results([lambda: first.gather("x"), fail])
    assert isinstance(found[0], PeerError) and str(found[0]) == "rank 1: gone"
    assert time.monotonic() - start < 5
    for ranks in (first, second):
        with pytest.raises(PeerError, match="rank 1: gone"):
            ranks.gather("y")


def test_a_rank_that_ends_while_another_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.1)
    first, second = ranks_of(2)

    def wait() -> object:
        try:
            return first.gather("x")
        except PeerError as error:
            first.failed(error)
            return str(error)

    found = results([wait, second.leave])
    assert found[0] == "rank 1 has ended, but rank 0 waits for it"


def test_leave_waits_for_all() -> None:
    ranks, ends = ranks_of(3), []

    def leave(r: Ranks) -> None:
        time.sleep(0.1 * r.rank)
        ends.append(time.monotonic())
        r.leave()
        assert len(ends) == 3

    every([lambda r=r: leave(r) for r in ranks])


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["cuda", "cpu"], ["cuda:0", "cuda:1", "cpu"]),
        (["numpy"], ["numpy:0", "numpy:1"]),
        (["null:0", "null:1"], ["null:0", "null:1"]),
        (["cuda", "cuda:1"], ["cuda", "cuda:1"]),
        (["null:3", "numpy"], ["null:3", "numpy"]),
    ],
)
def test_places(names: list[str], places: list[str]) -> None:
    assert ranks_of(2)[0].places(names) == places
    assert ranks_of(1)[0].places(names) == names
