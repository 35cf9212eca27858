"""Fixtures that imitate other machines: without pycuda, without a driver, with GPUs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from ctypes import CDLL
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pyggml.backends.cuda import backend, doctor, indexer
from pyggml.backends.cuda.attention import flash
from pyggml.backends.cuda.device import compiler, context, driver
from pyggml.backends.cuda.device.tensormap import EMPTY
from pyggml.backends.cuda.linear import ring
from pyggml.errors import DeviceError
from tests.cuda.allocations import ALLOCATIONS


@pytest.fixture(autouse=True)
def tensor_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver, which alone can encode tensor maps, record maps of zeros."""
    bindings = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    if not bindings or not any(Path(mark).exists() for mark in doctor.GPU_MARKS):
        for module in (flash, indexer, ring):
            monkeypatch.setattr(module, "tensor_map", lambda *_: EMPTY)


@pytest.fixture(autouse=True)
def unmarked_tests_need_no_compiler(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test that compiles a kernel but lacks its marker fails where NVRTC is installed, too."""
    if not any(request.node.get_closest_marker(marker) for marker in ("kernels", "stub")):

        def compile_instance(file: str, name: str, arch: str) -> compiler.Cubin:
            raise DeviceError(f"{name} of {file}: the test needs the marker `kernels`")

        monkeypatch.setattr(compiler, "compile_instance", compile_instance)


FAKE = Path(__file__).parent / "fake_pycuda"
PACKAGES = ("pycuda", "cupy-cuda13x", "cuda-bindings")
#: Functions that cache their results.
CACHED = (driver.imported, driver.driver, context.context, compiler.nvrtc)
VERSION = compiler.nvrtc_version.__wrapped__
#: Cached properties of a device.
PROPERTIES = ("context", "staging", "registry", "cublas")

Machine = Callable[..., None]


def driver_modules() -> dict[str, ModuleType]:
    """The imported modules of pycuda and cuda-bindings, real or fake."""
    names = [name for name in sys.modules if name.partition(".")[0] in ("pycuda", "cuda")]
    return {name: sys.modules[name] for name in names}


def forget() -> None:
    """Drop what the process has cached about its machine."""
    gc.collect()  # frees plans that exceptions of earlier tests kept: their memory is counted
    for function in CACHED:
        function.cache_clear()
    for name in driver_modules():
        del sys.modules[name]
    for device in map(backend.device, range(8)):
        device._peers.clear()
        for name in PROPERTIES:
            vars(device).pop(name, None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """`machine(pycuda, nvrtc)` imitates a machine until the end of the test.

    pycuda  None: no package of the extra `cuda` is installed; else the machine that fake_pycuda
            imitates
    nvrtc   whether NVRTC, its headers and cuBLAS are installed; kernels compile to nothing
    """
    version, real = metadata.version, driver_modules()

    def imitate(pycuda: str | None = None, nvrtc: bool = True) -> None:
        forget()
        monkeypatch.setenv("PYGGML_CACHE", str(tmp_path / "cache"))
        if pycuda is None:
            for name in ("pycuda", "pycuda.driver", "cuda"):
                monkeypatch.setitem(sys.modules, name, None)
        else:
            monkeypatch.syspath_prepend(FAKE)
            monkeypatch.setenv("PYCUDA_FAKE", pycuda)

        if pycuda is not None and pycuda.startswith("gpu"):
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
            monkeypatch.setattr(compiler, "compile_instance", fake_cubin)
        else:
            monkeypatch.setattr(compiler, "nvrtc_version", VERSION)
            monkeypatch.setattr(compiler.ctypes, "CDLL", without_nvrtc)

    yield imitate
    forget()
    sys.modules.update(real)


def without_nvrtc(name: str, *args: Any, **named: Any) -> Any:
    """ctypes.CDLL where NVRTC is not installed."""
    if "nvrtc" not in str(name):
        return CDLL(name, *args, **named)
    raise OSError(f"{name}: cannot open shared object file: No such file or directory")


def fake_cubin(file: str, name: str, arch: str) -> compiler.Cubin:
    """A cubin in place of the one that NVRTC would produce."""
    return compiler.Cubin(name, "_Z6symbol", arch, 32, 0, 0, 0, f"{file} {name} {arch}".encode())
