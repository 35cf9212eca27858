"""Random cases and random graphs on a GPU, against float64: `pyggml parity --mode fuzz`.

    python benchmarks/gpu_fuzz.py [--seconds 300] [--seed 2]

Three quarters of the time go to cases of single ops, the rest to whole graphs. The status is 1 if
one failed or ended its process; the output has the strings that run the failures again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys

from benchmarks.gpu_bench import SMOKE, write_row
from pyggml.backends.processors import n_processors

_COUNTS = re.compile(
    r"(\d[\d,]*) (?:cases?|graphs?) of .*: (\d[\d,]*) failed, .* (\d+) ended the process"
)


def run(what: str, seconds: int, seed: int, *words: str) -> int:
    """Fuzz, print the output, and write the rows; the status of the command."""
    command = (sys.executable, "-m", "pyggml", "parity", "--mode", "fuzz", "-b", "cuda")
    options = ("--seconds", str(seconds), "--seed", str(seed), "-j", str(n_processors()))
    done = subprocess.run([*command, *options, *words], capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    match = _COUNTS.search(done.stdout)
    if match is None:
        return 1
    n, failed, ended = (int(match[i].replace(",", "")) for i in (1, 2, 3))
    write_row(f"fuzz_{what}", what, [n])
    write_row(f"fuzz_{what}_failed", what, [failed + ended])
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=12 if os.environ.get(SMOKE) else 300)
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    graphs = args.seconds // 4
    status = run("cases", args.seconds - graphs, args.seed)
    return max(status, run("graphs", graphs, args.seed, "--graphs"))


if __name__ == "__main__":
    sys.exit(main())
