"""The CUDA part of `pyggml doctor`: what is present on this machine, and how to install the
rest."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from pyggml.backends.base import Finding
from pyggml.backends.cuda.device import compiler, driver, install, kernel_cache
from pyggml.backends.cuda.device.context import context
from pyggml.backends.cuda.gpu import H200
from pyggml.errors import DeviceError
from pyggml.extras import install_command

_PACKAGES = ("pycuda", "cupy-cuda13x", "cuda-bindings")
_SMALLEST = "rms_norm<1, 1, false, PLAIN>"
#: Files that exist when an NVIDIA driver is loaded: Linux, containers, WSL.
GPU_MARKS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
_ABSENT = ("not installed", "not found")


def present() -> bool:
    """Whether there is a GPU, and the packages that `bind` needs are installed."""
    modules = ("pycuda", "cupy", "cuda.bindings")
    return any(Path(mark).exists() for mark in GPU_MARKS) and all(map(find_spec, modules))


def findings() -> Iterator[Finding]:
    """The status of everything the backend needs, in the order of need.

    A missing package counts as broken only if there is a GPU that could use it.
    """
    gpu = any(Path(mark).exists() for mark in GPU_MARKS)
    if not gpu:
        text = "none here (no NVIDIA driver is loaded): the CUDA backend can plan but not run"
        yield Finding("GPU", text, state="absent")
    rows = [*map(_package, _PACKAGES), *_compiler(), _library()]
    absent = [row for row in rows if row.text in _ABSENT]
    for row in rows:
        if row in absent:
            fix = install.everything() if len(absent) > 1 else row.fix
            row = replace(row, fix=fix, state="broken" if gpu else "absent")
        yield row
    yield _cache()
    yield from _gpus(gpu)


def _package(name: str) -> Finding:
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, _ABSENT[0], install.package(name))


def _compiler() -> Iterator[Finding]:
    fix = install_command("kernels")
    try:
        version = ".".join(map(str, compiler.nvrtc_version()))
    except DeviceError:
        yield Finding("NVRTC", _ABSENT[1], fix)
        return
    yield Finding("NVRTC", version)
    try:
        yield Finding("CUDA headers", str(compiler.include_folders()[0]))
    except DeviceError:
        yield Finding("CUDA headers", _ABSENT[1], fix)
        return
    try:
        cubin = compiler.compile_instance("norm.cu", _SMALLEST, H200.arch)
    except DeviceError as error:
        reason = str(error).partition("\n")[0]
        yield Finding("a kernel", reason, f"{fix}: headers and NVRTC must agree", state="broken")
    else:
        yield Finding("a kernel", f"compiled for sm_{cubin.arch}, {len(cubin.code)} bytes")


def _library() -> Finding:
    for folder in compiler.folders("lib"):
        for path in sorted(folder.glob("libcublas.so.*")):
            return Finding("cuBLAS", str(path))
    return Finding("cuBLAS", _ABSENT[1], install_command("cuda"))


def _cache() -> Finding:
    folder = kernel_cache.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            cubins = [entry for entry in os.scandir(folder) if entry.name.endswith(".cubin")]
    except OSError as error:
        fix = "set PYGGML_CACHE to a writable folder"
        return Finding("kernel cache", str(error), fix, state="broken")
    size = sum(entry.stat().st_size for entry in cubins)
    return Finding("kernel cache", f"{folder}: {len(cubins)} kernels, {size / 2**20:.1f} MiB")


def _gpus(gpu: bool) -> Iterator[Finding]:
    if find_spec("pycuda") is None:
        return
    try:
        api = driver.driver()
    except driver.UnusableError as error:
        absent = error.absent and not gpu
        yield Finding("driver", error.what, error.fix, "absent" if absent else "broken")
        return
    yield Finding("driver", f"CUDA {driver.version_text(api.get_driver_version())}")
    for index in range(api.Device.count()):
        try:
            about = context(index).about
            size = f"{about.memory / 2**30:.0f} GiB, {about.sms} multiprocessors, sm_{about.arch}"
            yield Finding(f"cuda:{index}", f"{about.name}, {size}")
        except DeviceError as error:
            fix = "run on another GPU, or on backends=['numpy']"
            yield Finding(f"cuda:{index}", str(error), fix, state="broken")
