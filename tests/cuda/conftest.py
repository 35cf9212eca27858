"""Machines that this one is not: without pycuda, without a driver, with an old one, with a GPU."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pyggml.backends.cuda import backend, doctor
from pyggml.backends.cuda.attention import flash
from pyggml.backends.cuda.device import compiler, context, driver
from pyggml.backends.cuda.device.tensormap import TensorMap
from tests.cuda.allocations import ALLOCATIONS


@pytest.fixture(autouse=True)
def tensor_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the driver can write a tensor map: where there is none, recording gets zeros."""
    bindings = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    if not bindings or not any(Path(mark).exists() for mark in doctor.GPU_MARKS):
        monkeypatch.setattr(flash, "tensor_map", lambda *_: TensorMap(opaque=(0,) * 16))


FAKE = Path(__file__).parent / "fake_pycuda"
PACKAGES = ("pycuda", "cupy-cuda13x", "cuda-bindings")
#: What is found once and kept.
FOUND = (driver.imported, driver.driver, context.context, compiler.nvrtc)
VERSION = compiler.nvrtc_version.__wrapped__
#: What a device opens once and keeps.
OPENED = ("context", "staging", "cublas")

Machine = Callable[..., None]


def loaded() -> dict[str, ModuleType]:
    """The modules of pycuda and cuda-bindings, whichever they are."""
    names = [name for name in sys.modules if name.partition(".")[0] in ("pycuda", "cuda")]
    return {name: sys.modules[name] for name in names}


def forget() -> None:
    gc.collect()  # plans of earlier tests, which exceptions keep: their memory is counted
    for found in FOUND:
        found.cache_clear()
    for name in loaded():
        del sys.modules[name]
    for device in map(backend.device, range(2)):
        device._peers.clear()
        for name in OPENED:
            vars(device).pop(name, None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """`machine(pycuda, nvrtc)` makes the process believe that it runs there.

    pycuda  None: neither it nor the other packages are installed; else the kind of machine that
            fake_pycuda plays
    nvrtc   whether NVRTC, its headers and cuBLAS are there; kernels compile to nothing
    """
    version, real = metadata.version, loaded()

    def become(pycuda: str | None = None, nvrtc: bool = True) -> None:
        forget()
        monkeypatch.setenv("PYGGML_CACHE", str(tmp_path / "cache"))
        if pycuda is None:
            for name in ("pycuda", "pycuda.driver", "cuda"):
                monkeypatch.setitem(sys.modules, name, None)
        else:
            monkeypatch.syspath_prepend(FAKE)
            monkeypatch.setenv("PYCUDA_FAKE", pycuda)

        if pycuda in ("gpu", "gpus"):
            ALLOCATIONS.watch(import_module("pycuda.driver"))

        def installed(name: str) -> str:
            if name not in PACKAGES:
                return version(name)
            if pycuda is None:
                raise metadata.PackageNotFoundError(name)
            return "1.2.3"

        monkeypatch.setattr(doctor.metadata, "version", installed)
        folder = tmp_path / "toolkit"
        folder.mkdir(exist_ok=True)
        (folder / "libcublas.so.13").touch()
        monkeypatch.setattr(compiler, "folders", lambda part: iter([folder] if nvrtc else []))
        if nvrtc:
            monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
            monkeypatch.setattr(compiler, "include_folders", lambda: (folder,))
            monkeypatch.setattr(compiler, "compile_instance", compiled)
        else:
            monkeypatch.setattr(compiler, "nvrtc_version", VERSION)
            monkeypatch.setattr(compiler.ctypes, "CDLL", no_library)

    yield become
    forget()
    sys.modules.update(real)


def no_library(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file: No such file or directory")


def compiled(file: str, name: str, arch: str) -> compiler.Cubin:
    """What NVRTC might make of an instance."""
    return compiler.Cubin(name, "_Z6symbol", arch, 32, 0, 0, 0, f"{file} {name} {arch}".encode())
