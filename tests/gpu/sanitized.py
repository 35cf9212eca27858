"""A program for compute-sanitizer: cases of the parity grid from standard input, for a while.

    compute-sanitizer --tool memcheck python -m tests.gpu.sanitized SECONDS

Prints what became of each case as a line of JSON: the case, its status, why.
"""

from __future__ import annotations

import json
import sys
import time

from pyggml import backends
from pyggml.errors import DeviceError
from pyggml.parity.case import Case
from pyggml.parity.running import tested


def main() -> int:
    backends.get("cuda").alloc(16)
    end = time.monotonic() + float(sys.argv[1])
    for line in sys.stdin:
        if time.monotonic() > end:
            break
        case = line.strip()
        try:
            outcome = tested(Case.parse(case), "cuda")
            print(json.dumps([case, outcome.status, outcome.why]), flush=True)
        except DeviceError as fault:  # the tool ends the process, or the GPU is lost
            print(json.dumps([case, "fail", str(fault)]), flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
