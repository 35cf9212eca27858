"""Cases of the parity grid under compute-sanitizer: no access outside a kernel's memory (memcheck),
no races in shared memory (racecheck), no wrong barriers (synccheck).

The cases alternate between ops, with three cases of products, experts and attention for one of any
other op. Several processes share them until the time is up.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from pyggml.parity.cases import cases
from pyggml.parity.grid import all_cases
from tests.gpu.programs import Program

if TYPE_CHECKING:
    from tests.gpu.conftest import Options

Record = Callable[[str, object], None]
#: Three cases of these ops run for one of another: they have the most kernels.
MANY = ("flash_attn_ext", "mul_mat", "mul_mat_id", "moe_up_gate", "fused_up_gate")
#: Extra seconds for a process: to start, to finish its last case, and to end.
GRACE = 90
#: Output of the tools at the end, and if they cannot run.
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)")
REFUSAL = re.compile(r"=+ (?:Error: (?:Device not supported|No attachable).*|Internal Sanitizer.*)")


def spread(lines: Sequence[str]) -> Iterator[str]:
    """Cases of all ops in turn; those of each op in a random order that never changes."""
    groups: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if not re.search(r"@far|\.means\(", line):  # too large, or tested by other cases
            groups[line.partition("(")[0]].append(line)
    for group in groups.values():
        random.Random(0).shuffle(group)
    iterators = {op: iter(group) for op, group in groups.items()}
    while iterators:
        for op, remaining in tuple(iterators.items()):
            turn = list(islice(remaining, 3 if op in MANY else 1))
            yield from turn
            if not turn:
                del iterators[op]


class Verdict(NamedTuple):
    """The outcomes of the cases of one process, the tool's report, and how the process ended."""

    outcomes: list[list[str]]
    report: str
    end: str

    @property
    def errors(self) -> int | None:
        """Errors that the tool counted; None if it did not finish."""
        summary = SUMMARY.search(self.report)
        return None if summary is None else int(summary[1])

    @property
    def complaints(self) -> str:
        """The first lines about errors; without a summary, the end of the report."""
        if self.errors is None:
            return f"{self.report[-800:]}\n{self.end}"
        lines = [line.lstrip("= ") for line in self.report.splitlines()]
        relevant = re.compile(r"Invalid|Race reported|hazard|Error|at .*\+0x|Address")
        return "\n".join([line for line in lines if relevant.search(line)][:12])


def sanitizer() -> str | None:
    """The path of compute-sanitizer, if it is installed."""
    name = "compute-sanitizer"
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def run(command: str, tool: str, lines: Sequence[str], seconds: float, report: Path) -> Verdict:
    """Run cases in one process."""
    words = [command, "--tool", tool, "--report-api-errors", "no", "--log-file", str(report)]
    words += [sys.executable, "-W", "ignore", "-m", "tests.gpu.sanitized", str(seconds)]
    result = Program(words, "\n".join(lines)).wait(seconds + GRACE)
    outcomes = [json.loads(row) for row in result.out.splitlines() if row.startswith("[")]
    return Verdict(outcomes, report.read_text() if report.exists() else "", str(result))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_no_kernel_errs(
    tool: str, options: Options, record_property: Record, tmp_path: Path
) -> None:
    record_property(f"{tool}_cases", 0)
    command = sanitizer()
    if command is None:
        pytest.skip("compute-sanitizer is not installed")
    lines = list(spread([str(case) for case in (cases() if options.quick else all_cases())]))
    jobs, seconds = options.jobs, options.sanitize
    with ThreadPoolExecutor(jobs) as pool:
        running = [
            pool.submit(run, command, tool, lines[i::jobs], seconds, tmp_path / f"{i}")
            for i in range(jobs)
        ]
        verdicts = [future.result() for future in running]
    refusal = next(filter(None, (REFUSAL.search(verdict.report) for verdict in verdicts)), None)
    if refusal is not None:
        pytest.skip(f"compute-sanitizer cannot run here: {refusal[0].strip('= ')}")
    rows = [row for verdict in verdicts for row in verdict.outcomes if row[1] != "unsupported"]
    failures = [f"{case} {why}" for case, status, why in rows if status == "fail"]
    errors = sum(verdict.errors or 0 for verdict in verdicts)
    record_property(f"{tool}_cases", len(rows))
    record_property(f"{tool}_errors", errors)
    faulty = [verdict for verdict in verdicts if verdict.errors != 0]
    text = "\n".join([*failures[:3], *(verdict.complaints[:1500] for verdict in faulty[:3])])
    assert not failures and not faulty, (
        f"{tool}: {errors} errors, {len(failures)} cases failed\n{text}"
    )
    assert rows, "no case ran"
