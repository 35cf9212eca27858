"""A program for compute-sanitizer. Runs cases of the parity grid that it reads from stdin.

    compute-sanitizer --tool memcheck python -m tests.gpu.sanitized SECONDS

Starts no case after SECONDS. Prints a line of JSON for each: the case, its status, and why.
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
        except DeviceError as fault:  # after this error, the process cannot use the GPU
            print(json.dumps([case, "fail", str(fault)]), flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
