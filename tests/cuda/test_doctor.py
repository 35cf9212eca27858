"""`pyggml doctor` on machines that lack something: its findings, their fixes, and its status."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from pyggml import extras
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


def diagnosis(capsys: Streams) -> tuple[int, Rows]:
    """The exit status, and the findings about CUDA by name."""
    status = main(["doctor", "--json"])
    rows = [Finding(**row) for row in json.loads(capsys.readouterr().out)["cuda"]]
    return status, {row.what: row for row in rows}


def faults(rows: Rows) -> set[str]:
    """The names of the findings that need a fix."""
    return {row.what for row in rows.values() if row.fix}


def test_nothing_installed(machine: Machine, capsys: Streams, gpu: bool) -> None:
    machine(None, nvrtc=False)
    status, rows = diagnosis(capsys)
    assert status == gpu and faults(rows) == {*PACKAGES, "NVRTC", "cuBLAS"}
    assert {rows[name].state for name in faults(rows)} == {"broken" if gpu else "absent"}
    assert all(rows[name].text == "not installed" for name in PACKAGES)
    assert rows["NVRTC"].text == "not found"
    assert {row.fix for row in rows.values() if row.fix} == {install.everything()}
    assert "driver" not in rows  # only pycuda can query it
    assert ("GPU" in rows) != gpu


@pytest.mark.parametrize(
    ("missing", "fix"),
    [
        ("pycuda", "pip install pycuda, or if pip cannot build it, sh tools/build_pycuda.sh"),
        ("cupy-cuda13x", "pip install cupy-cuda13x"),
        ("NVRTC", 'pip install -e ".[kernels]"'),
        ("cuBLAS", 'pip install -e ".[cuda]"'),
    ],
)
def test_one_missing_package_is_the_only_fault(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Streams,
    gpu: bool,
    missing: str,
    fix: str,
) -> None:
    machine("gpu")
    version = doctor.metadata.version

    def without(name: str) -> str:
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    def fails() -> None:
        raise DeviceError("it is missing")

    monkeypatch.setattr(doctor.metadata, "version", without)
    if missing == "NVRTC":
        monkeypatch.setattr(compiler, "nvrtc_version", fails)
    if missing == "cuBLAS":
        monkeypatch.setattr(compiler, "folders", lambda part: iter([]))
    status, rows = diagnosis(capsys)
    assert status == gpu and faults(rows) == {missing}
    assert rows[missing].text in ("not installed", "not found") and rows[missing].fix == fix


def test_it_prints_a_line_per_finding_and_a_common_fix_once(
    machine: Machine, capsys: Streams, gpu: bool
) -> None:
    machine(None, nvrtc=False)
    assert main(["doctor"]) == gpu
    out = capsys.readouterr().out
    mark = "!" if gpu else "-"
    for name in PACKAGES:
        assert re.search(rf"^  {mark} {name} +not installed$", out, re.MULTILINE)
    assert out.partition("\ncuda\n")[2].partition("\nnumpy\n")[0].count("to fix it") == 1
    fix = re.escape('to fix it: make cuda, or pip install -e ".[cuda]"')
    assert re.search(rf"{mark} cuBLAS .*\n +{fix}", out)
    assert ("  - GPU " in out) != gpu
    assert "numpy" in out and "  + backend  ready" in out  # other backends need nothing


def test_fixes_for_users_of_a_wheel(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: Streams, tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "_TOP", tmp_path)
    monkeypatch.setattr(extras, "_TOP", tmp_path)
    machine(None, nvrtc=False)
    _, rows = diagnosis(capsys)
    fixes = {row.fix for row in rows.values() if row.fix}
    assert len(fixes) == 1
    (fix,) = fixes
    assert fix.startswith('pip install "pyggml[cuda]"; ') and "make" not in fix and "-e" not in fix
    assert f"sh {tmp_path}/tools/build_pycuda.sh" in fix  # the wheel contains it
    assert extras.install_command("kernels") == 'pip install "pyggml[kernels]"'


def test_everything_is_installed(machine: Machine, capsys: Streams, gpu: bool) -> None:
    machine("gpu")
    status, rows = diagnosis(capsys)
    assert (status, faults(rows)) == (0, set())
    assert rows["driver"].text == "CUDA 13.0"
    assert rows["cuda:0"].text == "fake GPU, 1 GiB, 108 multiprocessors, sm_80"


def test_a_missing_compiler_is_not_a_fault_of_the_driver(
    machine: Machine, capsys: Streams, gpu: bool
) -> None:
    machine("gpu", nvrtc=False)
    status, rows = diagnosis(capsys)
    assert status == gpu and faults(rows) == {"NVRTC", "cuBLAS"}
    assert rows["driver"] == Finding("driver", "CUDA 13.0") and "cuda:0" in rows


@pytest.mark.parametrize(
    ("name", "text", "fix", "absent"),
    [
        ("no driver", "there is no NVIDIA driver here (libcuda.so.1: cannot", "580 or newer", True),
        ("no device", "no GPU can be used: cuInit failed: no CUDA-capable", "nvidia-smi", True),
        ("old", "too old: it supports CUDA 12.2, the kernels need 13.0", "580 or newer", False),
        ("older", "too old for pycuda (_driver.so: undefined symbol: cu", "580 or newer", False),
        ("foreign", "pycuda cannot be loaded (libcurand", "sh tools/build_pycuda.sh", False),
    ],
)
def test_the_driver(
    machine: Machine, capsys: Streams, gpu: bool, name: str, text: str, fix: str, absent: bool
) -> None:
    machine(name)
    status, rows = diagnosis(capsys)
    broken = gpu or not absent  # without a GPU, a missing driver is no fault
    assert status == broken and faults(rows) == {"driver"}
    assert rows["driver"].state == ("broken" if broken else "absent")
    assert text in rows["driver"].text and fix in rows["driver"].fix
    assert "cuda:0" not in rows


def test_the_kernel_that_it_compiles_is_declared() -> None:
    declared = {instance.name for instance in instances([compiler.KERNELS / "norm.cu"])}
    assert doctor._SMALLEST in declared


def test_an_unwritable_cache(
    machine: Machine, capsys: Streams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine("gpu")
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("PYGGML_CACHE", str(file))
    status, rows = diagnosis(capsys)
    assert status == 1 and faults(rows) == {"kernel cache"}
    row = rows["kernel cache"]
    assert str(file) in row.text and "PYGGML_CACHE" in row.fix and row.state == "broken"


def test_a_broken_compiler(
    machine: Machine, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("gpu")

    def fails(*_: str) -> None:
        raise DeviceError("norm.cu(3): error: no such header\nand more")

    monkeypatch.setattr(compiler, "compile_instance", fails)
    status, rows = diagnosis(capsys)
    assert status == 1 and faults(rows) == {"a kernel"}
    assert rows["a kernel"].text == "norm.cu(3): error: no such header"
    assert "headers and NVRTC must agree" in rows["a kernel"].fix
