"""The real pycuda on machines without a GPU: without libcuda, or with a stub in its place.

`make stub` builds both (tools/build_pycuda.sh, tools/libcuda_stub.sh) and runs this. test_faults.py
and test_doctor.py test more cases with a fake pycuda.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

FOLDER = os.environ.get("PYGGML_STUB", "")

pytestmark = [
    pytest.mark.stub,
    pytest.mark.skipif(not FOLDER, reason="`make stub` builds what it needs and runs it"),
]

RUN = """
import pyggml as gg

y = {"y": gg.relu(gg.input("x", ne=(4,)))}
plan = gg.compile(y, backends=["cuda"])
for _ in range(2):  # the same error every time
    try:
        plan.run(x=[-1, 0, 1, 2])
    except gg.DeviceError as error:
        print(error)
print(gg.compile(y, backends=["numpy"]).run(x=[-1, 0, 1, 2])["y"].tolist())
"""
DOCTOR = "import sys; from pyggml.cli import main; sys.exit(main(['doctor']))"


def run(program: str, libcuda: bool, version: str) -> tuple[int, list[str]]:
    """Exit status and output lines of a process with pycuda; with the stub if `libcuda`."""
    folder = Path(FOLDER).resolve()
    env = {**os.environ, "PYTHONPATH": str(folder / "site"), "LIBCUDA_STUB_VERSION": version}
    if libcuda:
        paths = (str(folder / "lib"), env.get("LD_LIBRARY_PATH"))
        env["LD_LIBRARY_PATH"] = ":".join(filter(None, paths))
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert not result.stderr, result.stderr
    return result.returncode, result.stdout.splitlines()


@pytest.mark.parametrize(
    ("libcuda", "version", "text", "fix"),
    [
        pytest.param(
            False, "13000",
            "there is no NVIDIA driver here (libcuda.so.1: cannot open shared object file: ",
            "version 580 or newer",
            marks=pytest.mark.skipif(bool(find_library("cuda")), reason="a driver is here"),
        ),
        (True, "13000", "no GPU can be used: cuInit failed: no CUDA-capable device", "nvidia-smi"),
        (
            True, "12020",
            "the NVIDIA driver is too old: it supports CUDA 12.2, the kernels need 13.0",
            "version 580 or newer",
        ),
    ],
    ids=("no libcuda", "no device", "old driver"),
)  # fmt: skip
def test_a_machine_without_a_gpu(libcuda: bool, version: str, text: str, fix: str) -> None:
    status, (first, second, numpy) = run(RUN, libcuda, version)
    assert (status, second, numpy) == (0, first, "[0.0, 0.0, 1.0, 2.0]")
    assert first.startswith(text) and fix in first and "backends=['numpy']" in first

    status, lines = run(DOCTOR, libcuda, version)
    (at,) = (i for i, line in enumerate(lines) if re.match("  [-!] driver", line))
    assert text in lines[at] and status == any(line.startswith("  ! ") for line in lines)
    assert lines[at].startswith("  ! ") or version == "13000"  # an old driver is always a fault
    assert lines[at + 1].strip().startswith("to fix it: ") and fix in lines[at + 1]
    assert any(line.startswith("  + pycuda") for line in lines)
    assert not any("cuda:0" in line for line in lines)
