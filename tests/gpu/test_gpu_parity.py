"""The parity grid on a GPU, run by the command that users have: `pyggml parity -b cuda -j N`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pyggml.parity.cases import cases, has_meaning
from pyggml.parity.grid import all_cases
from tests.gpu.programs import Result, python

if TYPE_CHECKING:
    from tests.gpu.conftest import Options

Record = Callable[[str, object], None]


class Counts(NamedTuple):
    """Numbers of the cases that ran."""

    passed: int
    failed: int
    unsupported: int

    @property
    def cases(self) -> int:
        return sum(self)

    @staticmethod
    def of(out: str) -> Counts:
        """Counted in the output of the command, which may have been stopped."""
        ends = (r"^  \w.*\): OK$", r"^(?!  Backend ).* FAIL$", r"^  \w.*\): not supported \[")
        return Counts(*(len(re.findall(end, out, re.MULTILINE)) for end in ends))


def grid(*options: str, seconds: float, backend: str = "cuda") -> Result:
    """Run the command; stop it after `seconds`."""
    return python("-m", "pyggml", "parity", "-b", backend, *options).wait(seconds)


def test_every_case_is_within_its_bound(options: Options, record_property: Record) -> None:
    quick = ["--quick"] * options.quick
    result = grid("-j", str(options.jobs), *quick, seconds=options.seconds)
    counts = Counts.of(result.out)
    missing = len(cases() if options.quick else all_cases()) - counts.cases
    record_property("parity_cases", counts.cases)
    record_property("parity_failed", counts.failed + missing)
    # Where the GPU refuses an op with a meaning, the cases of its meaning run instead.
    refused = re.findall(r"^  (\w+)\(.*\): not supported \[", result.out, re.MULTILINE)
    refused = [op for op in refused if not has_meaning(op)]
    record_property("parity_unsupported_share", len(refused) / max(1, counts.cases))
    failed = re.findall(r"^  \w.*FAIL$", result.out, re.MULTILINE)
    assert not counts.failed, f"{counts}:\n" + "\n".join(line[:500] for line in failed[:20])
    assert not missing and result.status == 0, f"{missing} cases missing, {counts}, {result}"
    assert counts.passed and len(refused) <= 0.05 * counts.cases, counts
