"""What the CUDA backend finds here, what it lacks, and what mends it. For `pyggml doctor`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

from pyggml.backends.cuda.device import compiler, driver
from pyggml.backends.cuda.launch import H200
from pyggml.errors import DeviceError

#: (what, what was found, how to mend it: empty where nothing is wrong)
Finding = tuple[str, str, str]

_PACKAGES = ("pycuda", "cupy-cuda13x", "cuda-bindings")
#: What mends several missing packages at once.
ALL = f'pip install -e ".[cuda]"; where pycuda does not build, {driver.BUILD_PYCUDA}'
_SMALLEST = "rms_norm<1, 1, false, false>"


def findings() -> Iterator[Finding]:
    """Everything that the backend needs, in the order in which it is needed."""
    rows = [*map(_package, _PACKAGES), *_compiler(), _library()]
    missing = [row for row in rows if row[1] in ("not installed", "not found")]
    for row in rows:
        yield (*row[:2], ALL) if len(missing) > 1 and row in missing else row
    yield _cache()
    yield from _gpus()


def _package(name: str) -> Finding:
    try:
        return name, metadata.version(name), ""
    except metadata.PackageNotFoundError:
        return name, "not installed", driver.how_to_install(name)


def _compiler() -> Iterator[Finding]:
    mend = f"pip install {' '.join(compiler.PACKAGES)}"
    try:
        version = ".".join(map(str, compiler.nvrtc_version()))
    except DeviceError:
        yield "NVRTC", "not found", mend
        return
    yield "NVRTC", version, ""
    try:
        yield "CUDA headers", str(compiler.include_folders()[0]), ""
    except DeviceError:
        yield "CUDA headers", "not found", mend
        return
    try:
        made = compiler.compile_instance("norm.cu", _SMALLEST, H200.arch)
        yield "a kernel", f"compiled for sm_{made.arch}, {len(made.code)} bytes", ""
    except DeviceError as error:
        yield "a kernel", str(error).partition("\n")[0], f"{mend}: headers and NVRTC must agree"


def _library() -> Finding:
    for folder in compiler.folders("lib"):
        for path in sorted(folder.glob("libcublas.so.*")):
            return "cuBLAS", str(path), ""
    return "cuBLAS", "not found", driver.INSTALL_CUBLAS


def _cache() -> Finding:
    folder = compiler.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            kept = [entry for entry in os.scandir(folder) if entry.name.endswith(".cubin")]
    except OSError as error:
        return "kernel cache", str(error), "set PYGGML_CACHE to a folder that can be written"
    size = sum(entry.stat().st_size for entry in kept)
    return "kernel cache", f"{folder}: {len(kept)} kernels, {size / 2**20:.1f} MiB", ""


def _gpus() -> Iterator[Finding]:
    if find_spec("pycuda") is None:
        return
    try:
        found = driver.driver()
    except driver.UnusableError as error:
        yield "driver", error.what, error.mend
        return
    yield "driver", f"CUDA {driver.spoken(found.get_driver_version())}", ""
    for index in range(found.Device.count()):
        try:
            about = driver.context(index).about
            size = f"{about.memory / 2**30:.0f} GiB, {about.sms} multiprocessors, sm_{about.arch}"
            yield f"cuda:{index}", f"{about.name}, {size}", ""
        except DeviceError as error:
            yield f"cuda:{index}", str(error), "run on another GPU, or on backends=['numpy']"
