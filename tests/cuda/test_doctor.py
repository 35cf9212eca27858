"""`pyggml doctor` on machines that lack something: what it finds, what mends it, its status."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from pyggml.backends.cuda import doctor
from pyggml.backends.cuda.device import compiler
from pyggml.cli import main
from pyggml.errors import DeviceError
from tests.cuda.conftest import PACKAGES, Machine
from tools.compile_kernels import instances

Streams = pytest.CaptureFixture[str]
Rows = dict[str, tuple[str, str]]


def said(capsys: Streams) -> tuple[int, Rows]:
    """Its status, and what it says of CUDA: what -> (found, how to mend it)."""
    status = main(["doctor", "--json"])
    rows = json.loads(capsys.readouterr().out)["cuda"]
    return status, {row["what"]: (row["found"], row["mend"]) for row in rows}


def wrong(rows: Rows) -> set[str]:
    return {what for what, (_, mend) in rows.items() if mend}


def test_nothing_installed(machine: Machine, capsys: Streams) -> None:
    machine(None, nvrtc=False)
    status, rows = said(capsys)
    assert status == 1 and wrong(rows) == {*PACKAGES, "NVRTC", "cuBLAS"}
    assert all(rows[name][0] == "not installed" for name in PACKAGES)
    assert rows["NVRTC"][0] == "not found"
    assert {mend for _, mend in rows.values() if mend} == {doctor.ALL}
    assert "driver" not in rows  # nothing is there to ask it with


@pytest.mark.parametrize(
    ("what", "mend"),
    [
        ("pycuda", "pip install pycuda, or where that fails, from a checkout: sh tools/build_py"),
        ("cupy-cuda13x", "pip install cupy-cuda13x"),
        ("NVRTC", 'pip install "nvidia-cuda-nvrtc==13.0'),
        ("cuBLAS", 'pip install "nvidia-cublas==13'),
    ],
)
def test_what_is_missing_alone_is_named_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: Streams, what: str, mend: str
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
    assert status == 1 and wrong(rows) == {what}
    assert rows[what][0] in ("not installed", "not found") and rows[what][1].startswith(mend)


def test_it_prints_a_line_for_each_and_what_mends_all_once(
    machine: Machine, capsys: Streams
) -> None:
    machine(None, nvrtc=False)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    for name in PACKAGES:
        assert re.search(rf"^  - {name} +not installed$", out, re.MULTILINE)
    assert out.count("to mend it") == 1
    assert re.search(r"- cuBLAS .*\n +to mend it: pip install -e \"\.\[cuda\]\"", out)
    assert "numpy" in out and "  + backend  ready" in out  # other backends need nothing


def test_all_is_there(machine: Machine, capsys: Streams) -> None:
    machine("gpu")
    status, rows = said(capsys)
    assert (status, wrong(rows)) == (0, set())
    assert rows["driver"][0] == "CUDA 13.0"
    assert rows["cuda:0"][0] == "a GPU that is not there, 1 GiB, 108 multiprocessors, sm_80"


def test_a_compiler_that_is_missing_is_no_fault_of_the_driver(
    machine: Machine, capsys: Streams
) -> None:
    machine("gpu", nvrtc=False)
    status, rows = said(capsys)
    assert status == 1 and wrong(rows) == {"NVRTC", "cuBLAS"}
    assert rows["driver"] == ("CUDA 13.0", "") and "cuda:0" in rows


@pytest.mark.parametrize(
    ("kind", "found", "mend"),
    [
        ("no driver", "there is no NVIDIA driver here (libcuda.so.1: cannot", "580 or newer"),
        ("no device", "no GPU can be used: cuInit failed: no CUDA-capable", "nvidia-smi"),
        ("old", "too old: it speaks CUDA 12.2, the kernels need 13.0", "580 or newer"),
        ("older", "too old for pycuda (_driver.so: undefined symbol: cu", "580 or newer"),
        ("foreign", "pycuda cannot be loaded (libcurand", "sh tools/build_pycuda.sh"),
    ],
)
def test_the_driver(machine: Machine, capsys: Streams, kind: str, found: str, mend: str) -> None:
    machine(kind)
    status, rows = said(capsys)
    assert status == 1 and wrong(rows) == {"driver"}
    assert found in rows["driver"][0] and mend in rows["driver"][1]
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
    assert str(in_the_way) in rows["kernel cache"][0] and "PYGGML_CACHE" in rows["kernel cache"][1]


def test_a_compiler_that_does_not_work(
    machine: Machine, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("gpu")

    def fails(*_: str) -> None:
        raise DeviceError("norm.cu(3): error: no such header\nand more")

    monkeypatch.setattr(compiler, "compile_instance", fails)
    status, rows = said(capsys)
    assert status == 1 and wrong(rows) == {"a kernel"}
    assert rows["a kernel"][0] == "norm.cu(3): error: no such header"
    assert "headers and NVRTC must agree" in rows["a kernel"][1]
