"""`pyggml doctor` on machines that lack something: what it finds, what fixes it, its status."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from pyggml.backends.base import Finding
from pyggml.backends.cuda import doctor
from pyggml.backends.cuda.device import compiler, install
from pyggml.cli import main
from pyggml.errors import DeviceError
from tests.cuda.conftest import PACKAGES, Machine
from tools.compile_kernels import instances

Streams = pytest.CaptureFixture[str]
Rows = dict[str, Finding]


@pytest.fixture(params=[False, True], ids=["no GPU", "GPU"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bool:
    """Whether an NVIDIA driver is loaded on the machine."""
    mark = tmp_path / "nvidiactl"
    if request.param:
        mark.touch()
    monkeypatch.setattr(doctor, "GPU_MARKS", (str(mark),))
    return bool(request.param)


def said(capsys: Streams) -> tuple[int, Rows]:
    """Its status, and what it says of CUDA, by what it is about."""
    status = main(["doctor", "--json"])
    rows = [Finding(**row) for row in json.loads(capsys.readouterr().out)["cuda"]]
    return status, {row.what: row for row in rows}


def wrong(rows: Rows) -> set[str]:
    return {row.what for row in rows.values() if row.fix}


def test_nothing_installed(machine: Machine, capsys: Streams, gpu: bool) -> None:
    machine(None, nvrtc=False)
    status, rows = said(capsys)
    assert status == gpu and wrong(rows) == {*PACKAGES, "NVRTC", "cuBLAS"}
    assert {rows[what].state for what in wrong(rows)} == {"broken" if gpu else "absent"}
    assert all(rows[name].text == "not installed" for name in PACKAGES)
    assert rows["NVRTC"].text == "not found"
    assert {row.fix for row in rows.values() if row.fix} == {install.everything()}
    assert "driver" not in rows  # nothing is there to ask it with
    assert ("GPU" in rows) != gpu


@pytest.mark.parametrize(
    ("what", "fix"),
    [
        ("pycuda", "pip install pycuda, or if pip cannot build it, sh tools/build_pycuda.sh"),
        ("cupy-cuda13x", "pip install cupy-cuda13x"),
        ("NVRTC", 'pip install -e ".[kernels]"'),
        ("cuBLAS", 'pip install -e ".[cuda]"'),
    ],
)
def test_what_is_missing_alone_is_named_alone(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Streams,
    gpu: bool,
    what: str,
    fix: str,
) -> None:
    machine("gpu")
    asked = doctor.metadata.version

    def without(name: str) -> str:
        if name == what:
            raise metadata.PackageNotFoundError(name)
        return asked(name)

    def fails() -> None:
        raise DeviceError("it is not there")

    monkeypatch.setattr(doctor.metadata, "version", without)
    if what == "NVRTC":
        monkeypatch.setattr(compiler, "nvrtc_version", fails)
    if what == "cuBLAS":
        monkeypatch.setattr(compiler, "folders", lambda part: iter([]))
    status, rows = said(capsys)
    assert status == gpu and wrong(rows) == {what}
    assert rows[what].text in ("not installed", "not found") and rows[what].fix == fix


def test_it_prints_a_line_for_each_and_what_fixes_all_once(
    machine: Machine, capsys: Streams, gpu: bool
) -> None:
    machine(None, nvrtc=False)
    assert main(["doctor"]) == gpu
    out = capsys.readouterr().out
    mark = "!" if gpu else "-"
    for name in PACKAGES:
        assert re.search(rf"^  {mark} {name} +not installed$", out, re.MULTILINE)
    assert out.count("to fix it") == 1
    fix = re.escape('to fix it: make cuda, or pip install -e ".[cuda]"')
    assert re.search(rf"{mark} cuBLAS .*\n +{fix}", out)
    assert ("  - GPU " in out) != gpu
    assert "numpy" in out and "  + backend  ready" in out  # other backends need nothing


def test_users_of_a_wheel_are_told_what_they_can_do(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: Streams, tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "_TOP", tmp_path)
    machine(None, nvrtc=False)
    _, rows = said(capsys)
    fixes = {row.fix for row in rows.values() if row.fix}
    assert len(fixes) == 1
    (fix,) = fixes
    assert fix.startswith('pip install "pyggml[cuda]"; ') and "make" not in fix and "-e" not in fix
    assert f"sh {tmp_path}/tools/build_pycuda.sh" in fix  # the wheel brings it
    assert install.extra("kernels") == 'pip install "pyggml[kernels]"'


def test_all_is_there(machine: Machine, capsys: Streams, gpu: bool) -> None:
    machine("gpu")
    status, rows = said(capsys)
    assert (status, wrong(rows)) == (0, set())
    assert rows["driver"].text == "CUDA 13.0"
    assert rows["cuda:0"].text == "a GPU that is not there, 1 GiB, 108 multiprocessors, sm_80"


def test_a_compiler_that_is_missing_is_no_fault_of_the_driver(
    machine: Machine, capsys: Streams, gpu: bool
) -> None:
    machine("gpu", nvrtc=False)
    status, rows = said(capsys)
    assert status == gpu and wrong(rows) == {"NVRTC", "cuBLAS"}
    assert rows["driver"] == Finding("driver", "CUDA 13.0") and "cuda:0" in rows


@pytest.mark.parametrize(
    ("kind", "found", "fix", "absent"),
    [
        ("no driver", "there is no NVIDIA driver here (libcuda.so.1: cannot", "580 or newer", True),
        ("no device", "no GPU can be used: cuInit failed: no CUDA-capable", "nvidia-smi", True),
        ("old", "too old: it supports CUDA 12.2, the kernels need 13.0", "580 or newer", False),
        ("older", "too old for pycuda (_driver.so: undefined symbol: cu", "580 or newer", False),
        ("foreign", "pycuda cannot be loaded (libcurand", "sh tools/build_pycuda.sh", False),
    ],
)
def test_the_driver(
    machine: Machine, capsys: Streams, gpu: bool, kind: str, found: str, fix: str, absent: bool
) -> None:
    machine(kind)
    status, rows = said(capsys)
    broken = gpu or not absent  # what is only not there is in order on a machine without a GPU
    assert status == broken and wrong(rows) == {"driver"}
    assert rows["driver"].state == ("broken" if broken else "absent")
    assert found in rows["driver"].text and fix in rows["driver"].fix
    assert "cuda:0" not in rows


def test_the_kernel_that_it_tries_is_one_of_ours() -> None:
    declared = {one.name for one in instances([compiler.KERNELS / "norm.cu"])}
    assert doctor._SMALLEST in declared


def test_a_cache_that_cannot_be_written(
    machine: Machine, capsys: Streams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine("gpu")
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    monkeypatch.setenv("PYGGML_CACHE", str(in_the_way))
    status, rows = said(capsys)
    assert status == 1 and wrong(rows) == {"kernel cache"}
    row = rows["kernel cache"]
    assert str(in_the_way) in row.text and "PYGGML_CACHE" in row.fix and row.state == "broken"


def test_a_compiler_that_does_not_work(
    machine: Machine, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("gpu")

    def fails(*_: str) -> None:
        raise DeviceError("norm.cu(3): error: no such header\nand more")

    monkeypatch.setattr(compiler, "compile_instance", fails)
    status, rows = said(capsys)
    assert status == 1 and wrong(rows) == {"a kernel"}
    assert rows["a kernel"].text == "norm.cu(3): error: no such header"
    assert "headers and NVRTC must agree" in rows["a kernel"].fix
