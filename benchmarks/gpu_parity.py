"""Cases of the parity grid on a GPU, by several processes.

A worker takes neighbours in the grid, which share kernels: each of these is compiled by about one
of the workers, and found in the cache by the others. One whose GPU is lost, or that gives no answer
in time, is begun again behind the case at fault, which has failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryFile
from threading import Timer
from time import monotonic, perf_counter
from typing import IO, Any

from pyggml.errors import DeviceError

#: What a DeviceError says when the context is lost.
LOST = "can no longer use the GPU"
#: Cases that a worker takes at a time, and the seconds that it has for them.
CHUNK, PATIENCE = 40, 150
#: The case, what became of it, why, and its error.
Outcome = tuple[str, str, str, float | None]
#: What a worker's last line counts, in seconds.
PARTS = ("start", "kernels", "runs", "cases")


def worker(backend: str) -> int:
    """Check the cases of standard input; an outcome a line as JSON, at the end where the time went.
    Ends after a case that lost the GPU."""
    begin = perf_counter()
    spent = dict.fromkeys(PARTS, 0.0)
    from gpu_mirror import Mirrored

    from pyggml import backends
    from pyggml.parity.case import Case
    from pyggml.parity.running import tested

    mirror = Mirrored(backends.get(backend))
    if backend == "cuda":
        load = mirror.context.load

        def timed(launches: Any) -> None:
            start = perf_counter()
            load(launches)
            spent["kernels"] += perf_counter() - start

        mirror.context.load = timed
    mirror.install()
    spent["start"] = perf_counter() - begin
    for line in sys.stdin:
        begin = perf_counter()
        try:
            outcome = tested(Case.parse(line.strip()), backend)
            status, why, error = outcome.status, outcome.why, outcome.error
        except DeviceError as fault:
            status, why, error = "fail", f"{type(fault).__name__}: {fault}", None
        spent["cases"] += perf_counter() - begin
        print(json.dumps([line.strip(), status, why, error]), flush=True)
        if LOST in why:
            return 1
    print(json.dumps({**spent, "runs": mirror.seconds}), flush=True)
    return 0


class Worker:
    """A process that checks cases."""

    def __init__(self, backend: str) -> None:
        self.command = [sys.executable, "-W", "ignore", __file__, backend]
        self.process: subprocess.Popen[str] | None = None
        self.errors: IO[str] = TemporaryFile("w+")  # noqa: SIM115

    def check(self, lines: Sequence[str]) -> list[Outcome]:
        done: list[Outcome] = []
        while len(done) < len(lines):
            done += self._answers(lines[len(done) :])
            if len(done) < len(lines) and (not done or LOST not in done[-1][2]):
                done.append((lines[len(done)], "fail", f"the worker died: {self._last()}", None))
        return done

    def _answers(self, lines: Sequence[str]) -> list[Outcome]:
        """Of all lines, or of those before the process ended."""
        if self.process is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True
            )
        process, found = self.process, []
        watch = Timer(PATIENCE, process.kill)
        watch.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write("".join(f"{line}\n" for line in lines))
            process.stdin.flush()
            while len(found) < len(lines) and (answer := process.stdout.readline()):
                if answer.startswith("["):
                    found.append(tuple(json.loads(answer)))
        except BrokenPipeError:
            pass
        finally:
            watch.cancel()
        if len(found) < len(lines):
            process.kill()
            process.wait()
            self.process = None
        return found  # type: ignore[return-value]

    def _last(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-600:] or f"no word of why, perhaps no answer in {PATIENCE} s"

    def close(self) -> dict[str, float]:
        """Where its time went."""
        if self.process is None:
            return {}
        told, _ = self.process.communicate()
        found: dict[str, float] = json.loads(told.splitlines()[-1]) if told.strip() else {}
        return found


def checked(
    lines: Sequence[str], jobs: int, seconds: float, backend: str = "cuda"
) -> tuple[list[Outcome], list[dict[str, float]]]:
    """Outcomes of the cases that `jobs` workers reach in time, and where the time of each went."""
    chunks = deque(lines[i : i + CHUNK] for i in range(0, len(lines), CHUNK))
    end = monotonic() + seconds

    def work(_: int) -> tuple[list[Outcome], dict[str, float]]:
        one, found = Worker(backend), []
        while monotonic() < end:
            try:
                chunk = chunks.popleft()
            except IndexError:
                break
            found += one.check(chunk)
        return found, one.close()

    with ThreadPoolExecutor(jobs) as pool:
        made = list(pool.map(work, range(jobs)))
    return [o for some, _ in made for o in some], [spent for _, spent in made if spent]


def report(outcomes: Sequence[Outcome], log: list[str]) -> Counter[str]:
    """A table by op, the first failures of each; all outcomes into the log. Counts by status."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    worst: dict[str, float] = defaultdict(float)
    shown: Counter[str] = Counter()
    for line, status, why, error in outcomes:
        op = line.partition("(")[0]
        table[op][status] += 1
        worst[op] = max(worst[op], error or 0.0)
        log.append(f"{status:12} {line}  {why}")
        if status == "fail" and shown[op] < 3:
            shown[op] += 1
            print(f"FAIL {line}\n     {why[:500]}")
    total: Counter[str] = sum(table.values(), Counter())
    print(f"{'op':18} {'ok':>6} {'fail':>6} {'unsup':>6}  worst NMSE")
    for op, counts in (*sorted(table.items()), ("all", total)):
        numbers = " ".join(f"{counts[s]:>6}" for s in ("ok", "fail", "unsupported"))
        print(f"{op:18} {numbers}" + (f"  {worst[op]:.2g}" if op in worst else ""))
    return total


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1]))
