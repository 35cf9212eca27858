"""Cases of the parity grid under compute-sanitizer: no kernel leaves its memory (memcheck), none
races for shared memory (racecheck).

The cases take turns by op, those of products, experts and attention three to one of another, until
the time is up; each worker's process takes its share of them.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

#: Of these ops three cases are taken for one of another: they have most kernels.
MANY = ("flash_attn_ext", "mul_mat", "mul_mat_id", "moe_up_gate", "fused_up_gate")
#: Seconds that a process has beside those for cases: to begin, for its last case, to end.
GRACE = 90
#: What the tools say at their end, and where they cannot run.
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)")
REFUSED = re.compile(r"=+ (?:Error: (?:Device not supported|No attachable).*|Internal Sanitizer.*)")


def spread(lines: Sequence[str]) -> Iterator[str]:
    """All ops in turns, cases of each in an order that is random and always the same."""
    groups: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if not re.search(r"@far|\.means\(", line):  # gigabytes, and what other cases have
            groups[line.partition("(")[0]].append(line)
    for group in groups.values():
        random.Random(0).shuffle(group)
    left = {op: iter(group) for op, group in groups.items()}
    while left:
        for op, cases in tuple(left.items()):
            some = list(islice(cases, 3 if op in MANY else 1))
            yield from some
            if not some:
                del left[op]


def worker(seconds: float) -> int:
    """Check cases of standard input for so long; what became of each as a line of JSON."""
    from pyggml import backends
    from pyggml.errors import DeviceError
    from pyggml.parity.case import Case
    from pyggml.parity.running import tested

    backends.get("cuda").alloc(16)
    end = time.monotonic() + seconds
    for line in sys.stdin:
        if time.monotonic() > end:
            break
        try:
            outcome = tested(Case.parse(line.strip()), "cuda")
            print(json.dumps([line.strip(), outcome.status, outcome.why]), flush=True)
        except DeviceError as fault:  # the tools end the process or the GPU is lost
            print(json.dumps([line.strip(), "fail", str(fault)]), flush=True)
            return 1
    return 0


def found() -> str | None:
    """Where compute-sanitizer is."""
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def _run(tool: str, lines: Sequence[str], seconds: float, told: Path) -> tuple[str, str]:
    """Outcomes of one worker and what the tool has to say of it."""
    command = [
        str(found()), "--tool", tool, "--report-api-errors", "no", "--log-file", str(told),
        sys.executable, "-W", "ignore", __file__, str(seconds),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            input="\n".join(lines),
            capture_output=True,
            text=True,
            timeout=seconds + GRACE,
        )
        out, err = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        out, err = (late.stdout or b"").decode(), f"no end after {seconds + GRACE} s"
    said = told.read_text() if told.exists() else ""
    return out, said if SUMMARY.search(said) or REFUSED.search(said) else f"{said}\n{err[-800:]}"


def sanitized(
    tool: str, lines: Sequence[str], jobs: int, seconds: float, log: list[str]
) -> tuple[int, int, bool]:
    """Run `tool` over a spread of the cases and print its verdict: how many cases ran, the errors
    that it found, whether all is fine. No case where the machine does not let it run, and a line
    that says so."""
    if found() is None:
        print(f"sanitize {tool}: NOT RUN, there is no compute-sanitizer here")
        return 0, 0, True
    order = list(spread(lines))
    with TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        parts = [(order[i::jobs], Path(folder, str(i))) for i in range(jobs)]
        answers = list(pool.map(lambda part: _run(tool, part[0], seconds, part[1]), parts))
    outcomes = [
        json.loads(row) for out, _ in answers for row in out.splitlines() if row.startswith("[")
    ]
    said = [text for _, text in answers]
    log += said
    refused = next(filter(None, map(REFUSED.search, said)), None)
    if refused is not None:
        print(f"sanitize {tool}: NOT RUN, the machine does not let it: {refused[0].strip('= ')}")
        return 0, 0, True
    ran = [(line, why) for line, status, why in outcomes if status != "unsupported"]
    failed = [f"{line} {why}" for line, status, why in outcomes if status == "fail"]
    ends = [SUMMARY.search(text) for text in said]
    errors = sum(int(one[1]) for one in ends if one is not None)
    dead = sum(one is None for one in ends)
    fine = not (errors or failed or dead) and bool(ran)
    ops = Counter(line.partition("(")[0] for line, _ in ran)
    print(
        f"sanitize {tool}: {'ok' if fine else 'FAIL'}, {len(ran)} cases of {len(ops)} ops, "
        f"{errors} errors, {len(failed)} cases failed, {dead} of {jobs} processes died"
    )
    print("    " + ", ".join(f"{op} {n}" for op, n in sorted(ops.items())))
    for text in (*failed[:3], *(_worst(text) for text in said)):
        if text and not fine:
            print(text[:1500])
    return len(ran), errors, fine


def _worst(said: str) -> str:
    """The first things that a tool complains of; all of it where it came to no end."""
    if SUMMARY.search(said) is None:
        return said[-800:]
    lines = [line.lstrip("= ") for line in said.splitlines()]
    wanted = re.compile(r"Invalid|Race reported|hazard|Error|at .*\+0x|Address")
    return "\n".join([line for line in lines if wanted.search(line)][:12])


if __name__ == "__main__":
    sys.exit(worker(float(sys.argv[1])))
