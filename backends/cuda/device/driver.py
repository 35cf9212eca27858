"""One GPU: its primary context, shared with CuPy and PyTorch, its stream, its loaded kernels.

pycuda opens the context and keeps streams, events and memory; cuda-bindings loads and launches
kernels, as pycuda's launches take no attributes. Both are imported on first use. Whatever goes
wrong is a DeviceError that says what to do.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from pyggml.backends.cuda.device import compiler, install
from pyggml.backends.cuda.launch import Device, Launch
from pyggml.errors import DeviceError, OutOfMemoryError

#: The oldest compute capability that the kernels are written for.
OLDEST = (8, 0)
#: Dynamic shared memory that a block has without asking for more.
FREE_SHARED = 48 * 1024


class UnusableError(DeviceError):
    """There is no driver, no GPU, or one that is too old.

    what    what is wrong;  fix: what to do
    absent  whether it is just not here, as on a machine without a GPU
    """

    def __init__(self, what: str, fix: str, absent: bool = False) -> None:
        super().__init__(f"{what}. To fix it: {fix}. `pyggml doctor` says what else is missing")
        self.what, self.fix, self.absent = what, fix, absent


_INSTALL = "install an NVIDIA driver of version 580 or newer, or run on backends=['numpy']"


#: Packages by the first part of their modules' names, where the two differ.
_PACKAGES = {"cupy": "cupy-cuda13x", "cupy_backends": "cupy-cuda13x", "cuda": "cuda-bindings"}


@cache
def imported(module: str) -> Any:
    """A module that the extra `cuda` installs; UnusableError where it cannot be loaded."""
    try:
        with warnings.catch_warnings(action="ignore"):  # pycuda's guess at why it cannot load
            return import_module(module)
    except ImportError as error:
        first = module.partition(".")[0]
        raise _unloaded(_PACKAGES.get(first, first), error) from None


@cache
def driver() -> Any:
    """pycuda.driver, initialised; UnusableError without pycuda or a new enough driver."""
    found = imported("pycuda.driver")
    version, needed = found.get_driver_version(), _needed()
    if version < needed:
        raise UnusableError(
            f"the NVIDIA driver is too old: it speaks CUDA {spoken(version)}, the kernels need "
            f"{spoken(needed)}",
            f"{_INSTALL}; an older NVRTC does too",
        )
    try:
        found.init()
    except found.Error as error:
        raise UnusableError(
            f"no GPU can be used: {error}",
            "see whether nvidia-smi lists one and CUDA_VISIBLE_DEVICES (or the container) lets it "
            "through, or run on backends=['numpy']",
            absent=True,
        ) from None
    return found


def _unloaded(package: str, error: ImportError) -> UnusableError:
    """Why a package cannot be imported: it is not there, or what it is linked with is not."""
    if isinstance(error, ModuleNotFoundError):
        return UnusableError(
            f"the CUDA backend needs {package}, and the module {error.name} is not installed",
            install.package(package),
        )
    if "undefined symbol: cu" in str(error):
        return UnusableError(f"the NVIDIA driver is too old for {package} ({error})", _INSTALL)
    if "libcuda.so" in str(error):
        return UnusableError(f"there is no NVIDIA driver here ({error})", _INSTALL, absent=True)
    if "libcublas" in str(error):
        return UnusableError(f"{package} finds no cuBLAS ({error})", install.extra("cuda"))
    return UnusableError(
        f"{package} cannot be loaded ({error})",
        f"build it on this machine: {install.build_pycuda()}"
        if package == "pycuda"
        else f"pip install --force-reinstall {package}",
    )


def _needed() -> int:
    """The CUDA version that the compiled kernels need; 0 without a compiler, which is missed when
    there is something to compile."""
    try:
        return 1000 * compiler.nvrtc_version()[0]
    except DeviceError:
        return 0


def spoken(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Errors of pycuda and CuPy as ours; `what` was being done."""
    found = driver()
    try:
        yield
    except found.MemoryError as error:
        raise OutOfMemoryError(f"{what}: {error}") from None
    except (found.Error, RuntimeError) as error:
        if not isinstance(error, found.Error) and not type(error).__module__.startswith("cupy"):
            raise
        raise DeviceError(f"{what}: {error}. {_advice(str(error))}") from None


#: Words of the driver after which a context answers nothing else.
_STICKY = ("illegal", "misaligned", "launch failed", "hardware stack", "invalid pc", "assert")


def _advice(text: str) -> str:
    if any(word in text for word in _STICKY):
        return (
            "A kernel that ran before did it, and this process can no longer use the GPU. "
            "Start again with PYGGML_CUDA_DEBUG=1: the step at fault is then named"
        )
    return "Nothing else is known about it"


class Context:
    """A GPU. `with context:` makes it current in this thread, and may be nested."""

    def __init__(self, index: int) -> None:
        self.driver = driver()
        self.index = index
        count = self.driver.Device.count()
        if index >= count:
            there = ", ".join(f"cuda:{i}" for i in range(count)) or "none"
            raise DeviceError(
                f"there is no cuda:{index}; GPUs here: {there}. Choose one of these, or run on "
                "backends=['numpy']"
            )
        with guarded(f"opening cuda:{index}"):
            handle = self.driver.Device(index)
            self.about = _described(handle, self.driver)
            self.primary = handle.retain_primary_context()
        self._functions: dict[tuple[str, str], Any] = {}  # CUfunction by file and name
        self._shared: dict[tuple[str, str], int] = {}  # dynamic bytes that were asked for
        with self:
            self.stream = self.driver.Stream()

    def __enter__(self) -> Context:
        self.primary.push()
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.Context.pop()

    @property
    def external(self) -> Any:
        """The stream as CuPy's: capture and graphs come from there."""
        cupy = imported("cupy")
        return cupy.cuda.ExternalStream(self.stream.handle, self.index)

    # -- by cuda-bindings ---------------------------------------------------------------------

    def load(self, launches: Sequence[Launch]) -> None:
        """Compile (or find compiled) and load every kernel of these launches."""
        keys = dict.fromkeys((launch.file, launch.name) for launch in launches)
        new = [key for key in keys if key not in self._functions]
        for key, cubin in compiler.cubins(new, self.about.arch).items():
            self._functions[key] = _function(cubin)
        for launch in launches:
            self._allow_shared(launch)

    def _allow_shared(self, launch: Launch) -> None:
        """Dynamic shared memory that a function may have only when asked for."""
        key = launch.file, launch.name
        if launch.shared <= self._shared.get(key, FREE_SHARED):
            return
        cu = imported("cuda.bindings.driver")
        limit = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        what = f"{launch.name}: {launch.shared} bytes of shared memory"
        _checked(cu, what, cu.cuFuncSetAttribute(self._functions[key], limit, launch.shared))
        self._shared[key] = launch.shared

    def start(self, launch: Launch) -> None:
        """Put a loaded kernel into the stream."""
        cu = imported("cuda.bindings.driver")
        config = cu.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block
        config.sharedMemBytes = launch.shared
        config.hStream = cu.CUstream(self.stream.handle)
        if launch.overlap:
            attribute = cu.CUlaunchAttribute()
            ids = cu.CUlaunchAttributeID
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        # The arguments as one buffer: POINTER 1, SIZE 2, END 0.
        buffer, size = ctypes.create_string_buffer(launch.args), ctypes.c_size_t(len(launch.args))
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
        function = self._functions[launch.file, launch.name]
        status = cu.cuLaunchKernelEx(config, function, 0, ctypes.addressof(extra))
        _checked(cu, launch.name, status)

    def copy_from(self, other: Context, target: int, source: int, nbytes: int) -> None:
        """Queue a copy from the memory of another GPU; pycuda's takes both for the current one."""
        cu = imported("cuda.bindings.driver")
        what = f"copying from cuda:{other.index} to cuda:{self.index}"
        with other:
            theirs = _checked(cu, what, cu.cuCtxGetCurrent())
        with self:
            mine = _checked(cu, what, cu.cuCtxGetCurrent())
            stream = cu.CUstream(self.stream.handle)
            status = cu.cuMemcpyPeerAsync(target, mine, source, theirs, nbytes, stream)
            _checked(cu, what, status)


def _function(cubin: compiler.Cubin) -> Any:
    """The kernel of a module, which stays loaded as long as the context."""
    cu = imported("cuda.bindings.driver")
    what = f"loading {cubin.name}"
    module = _checked(cu, what, cu.cuModuleLoadData(cubin.code))
    return _checked(cu, what, cu.cuModuleGetFunction(module, cubin.symbol.encode()))


def _checked(cu: Any, what: str, answer: tuple[Any, ...]) -> Any:
    """The result of a call of cuda-bindings; DeviceError where it failed."""
    status, *results = answer
    if status == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemoryError(f"{what}: {status.name}")
    if status != cu.CUresult.CUDA_SUCCESS:
        words = status.name.lower().replace("_", " ")
        raise DeviceError(f"{what}: {status.name}. {_advice(words)}")
    return results[0] if results else None


def _described(handle: Any, found: Any) -> Device:
    """What kernels may depend on; DeviceError for a GPU that is too old."""
    capability = handle.compute_capability()
    if capability < OLDEST:
        raise DeviceError(
            f"{handle.name()} has compute capability {'.'.join(map(str, capability))}; "
            f"the kernels need {'.'.join(map(str, OLDEST))} (Ampere) or newer"
        )
    attribute, read = found.device_attribute, handle.get_attribute
    # From 9.0 on an architecture has instructions of its own, which its "a" target allows.
    arch = "{}{}".format(*capability) + ("a" if capability >= (9, 0) else "")
    return Device(
        name=handle.name(),
        arch=arch,
        sms=read(attribute.MULTIPROCESSOR_COUNT),
        shared=read(attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        l2=read(attribute.L2_CACHE_SIZE),
        memory=handle.total_memory(),
    )


@cache
def context(index: int) -> Context:
    """The context of that GPU, opened once."""
    return Context(index)
