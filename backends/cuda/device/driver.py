"""pycuda, CuPy and cuda-bindings: imported on first use, and their errors turned into DeviceErrors
whose message contains the fix."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import Any

from pyggml.backends.cuda.device import compiler, install
from pyggml.errors import DeviceError, OutOfMemoryError
from pyggml.extras import install_command


class UnusableError(DeviceError):
    """The driver or the GPU is missing, or too old.

    what    the problem
    fix     how to fix it
    absent  whether it is merely missing, as on a machine without a GPU
    """

    def __init__(self, what: str, fix: str, absent: bool = False) -> None:
        super().__init__(f"{what}. To fix this: {fix}. `pyggml doctor` lists what else is missing")
        self.what, self.fix, self.absent = what, fix, absent


_INSTALL = "install an NVIDIA driver of version 580 or newer, or run on backends=['numpy']"


#: Packages whose name differs from the first part of their modules' names.
_PACKAGES = {"cupy": "cupy-cuda13x", "cupy_backends": "cupy-cuda13x", "cuda": "cuda-bindings"}


@cache
def imported(module: str) -> Any:
    """A module of the extra `cuda`; UnusableError if it cannot be imported."""
    try:
        with warnings.catch_warnings(action="ignore"):  # pycuda guesses at why it cannot load
            return import_module(module)
    except ImportError as error:
        first = module.partition(".")[0]
        raise _unloaded(_PACKAGES.get(first, first), error) from None


@cache
def driver() -> Any:
    """pycuda.driver, initialized; UnusableError without pycuda or a recent driver."""
    api = imported("pycuda.driver")
    version, needed = api.get_driver_version(), _needed()
    if version < needed:
        raise UnusableError(
            f"the NVIDIA driver is too old: it supports CUDA {version_text(version)}, the kernels "
            f"need {version_text(needed)}",
            f"{_INSTALL}; an older NVRTC also works",
        )
    try:
        api.init()
    except api.Error as error:
        raise UnusableError(
            f"no GPU can be used: {error}",
            "check that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES (or the container) does "
            "not hide it, or run on backends=['numpy']",
            absent=True,
        ) from None
    return api


def _unloaded(package: str, error: ImportError) -> UnusableError:
    """The reason why a package cannot be imported: it or a library it links to is missing."""
    if isinstance(error, ModuleNotFoundError):
        return UnusableError(
            f"the CUDA backend needs {package}, and the module {error.name} is not installed",
            install.everything(),
        )
    if "undefined symbol: cu" in str(error):
        return UnusableError(f"the NVIDIA driver is too old for {package} ({error})", _INSTALL)
    if "libcuda.so" in str(error):
        return UnusableError(f"there is no NVIDIA driver here ({error})", _INSTALL, absent=True)
    if "libcublas" in str(error):
        return UnusableError(f"{package} finds no cuBLAS ({error})", install_command("cuda"))
    return UnusableError(
        f"{package} cannot be loaded ({error})",
        f"build it on this machine: {install.build_pycuda()}"
        if package == "pycuda"
        else f"pip install --force-reinstall {package}",
    )


def _needed() -> int:
    """The CUDA version that compiled kernels need; 0 without a compiler, whose absence is reported
    when there is a kernel to compile."""
    try:
        return 1000 * compiler.nvrtc_version()[0]
    except DeviceError:
        return 0


def version_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


class Guarded:
    """Turns errors of pycuda and CuPy into DeviceError; `what` describes the operation.

    A class, because a step of a model enters several of these: a generator takes three times as
    long.
    """

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        api = driver()
        if isinstance(error, api.MemoryError):
            raise OutOfMemoryError(f"{self._what}: {error}") from None
        from_cupy = isinstance(error, RuntimeError) and type(error).__module__.startswith("cupy")
        if from_cupy or isinstance(error, api.Error):
            raise DeviceError(f"{self._what}: {error}. {_advice(str(error))}") from None


guarded = Guarded


#: Words in the driver's errors after which the context is unusable.
_STICKY = ("illegal", "misaligned", "launch failed", "hardware stack", "invalid pc", "assert")


def _advice(text: str) -> str:
    if any(word in text for word in _STICKY):
        return (
            "A kernel that ran earlier caused it, and this process can no longer use the GPU. "
            "Run again with PYGGML_CUDA_DEBUG=1 to get the name of the failing step"
        )
    return "No more is known about it"


def checked(cu: Any, what: str, answer: tuple[Any, ...]) -> Any:
    """The result of a cuda-bindings call; DeviceError if it failed."""
    status, *results = answer
    if status == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemoryError(f"{what}: {status.name}")
    if status != cu.CUresult.CUDA_SUCCESS:
        text = status.name.lower().replace("_", " ")
        raise DeviceError(f"{what}: {status.name}. {_advice(text)}")
    return results[0] if results else None
