"""One GPU: its primary context, shared with CuPy and PyTorch, its stream, its loaded kernels.

pycuda opens the context and manages streams, events and memory; cuda-bindings loads and launches
kernels, because pycuda's launches take no attributes. Both are imported on first use. All failures
are DeviceErrors whose message contains the fix.
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

#: The oldest compute capability that the kernels support.
OLDEST = (8, 0)
#: Bytes of dynamic shared memory that a block may use by default.
FREE_SHARED = 48 * 1024


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
    """The CUDA version that compiled kernels need; 0 without a compiler, whose absence is reported
    when there is a kernel to compile."""
    try:
        return 1000 * compiler.nvrtc_version()[0]
    except DeviceError:
        return 0


def version_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turn errors of pycuda and CuPy into DeviceError; `what` describes the operation."""
    api = driver()
    try:
        yield
    except api.MemoryError as error:
        raise OutOfMemoryError(f"{what}: {error}") from None
    except (api.Error, RuntimeError) as error:
        if not isinstance(error, api.Error) and not type(error).__module__.startswith("cupy"):
            raise
        raise DeviceError(f"{what}: {error}. {_advice(str(error))}") from None


#: Words in the driver's errors after which the context is unusable.
_STICKY = ("illegal", "misaligned", "launch failed", "hardware stack", "invalid pc", "assert")


def _advice(text: str) -> str:
    if any(word in text for word in _STICKY):
        return (
            "A kernel that ran earlier caused it, and this process can no longer use the GPU. "
            "Run again with PYGGML_CUDA_DEBUG=1 to get the name of the failing step"
        )
    return "No more is known about it"


class Context:
    """A GPU. `with context:` makes it current in this thread and may be nested."""

    def __init__(self, index: int) -> None:
        self.driver = driver()
        self.index = index
        count = self.driver.Device.count()
        if index >= count:
            names = ", ".join(f"cuda:{i}" for i in range(count)) or "none"
            raise DeviceError(
                f"there is no cuda:{index}; GPUs here: {names}. Choose one of these, or run on "
                "backends=['numpy']"
            )
        with guarded(f"opening cuda:{index}"):
            handle = self.driver.Device(index)
            self.about = _described(handle, self.driver)
            self.primary = handle.retain_primary_context()
        self._functions: dict[tuple[str, str], Any] = {}  # CUfunction by file and name
        self._shared: dict[tuple[str, str], int] = {}  # dynamic bytes allowed so far
        with self:
            self.stream = self.driver.Stream()

    def __enter__(self) -> Context:
        self.primary.push()
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.Context.pop()

    @property
    def external(self) -> Any:
        """The stream as a CuPy object, which provides capture and graphs."""
        cupy = imported("cupy")
        return cupy.cuda.ExternalStream(self.stream.handle, self.index)

    # -- by cuda-bindings ---------------------------------------------------------------------

    def load(self, launches: Sequence[Launch]) -> None:
        """Compile (or take from the cache) and load every kernel of these launches."""
        keys = dict.fromkeys((launch.file, launch.name) for launch in launches)
        new = [key for key in keys if key not in self._functions]
        for key, cubin in compiler.cubins(new, self.about.arch).items():
            self._functions[key] = _function(cubin)
        for launch in launches:
            self._allow_shared(launch)

    def _allow_shared(self, launch: Launch) -> None:
        """Allow a kernel more than the default dynamic shared memory."""
        key = launch.file, launch.name
        if launch.shared <= self._shared.get(key, FREE_SHARED):
            return
        cu = imported("cuda.bindings.driver")
        limit = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        what = f"{launch.name}: {launch.shared} bytes of shared memory"
        _checked(cu, what, cu.cuFuncSetAttribute(self._functions[key], limit, launch.shared))
        self._shared[key] = launch.shared

    def start(self, launch: Launch) -> None:
        """Queue a loaded kernel."""
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
        # Pass the arguments as one buffer: CU_LAUNCH_PARAM_ BUFFER_POINTER 1, BUFFER_SIZE 2, END 0.
        buffer, size = ctypes.create_string_buffer(launch.args), ctypes.c_size_t(len(launch.args))
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
        function = self._functions[launch.file, launch.name]
        status = cu.cuLaunchKernelEx(config, function, 0, ctypes.addressof(extra))
        _checked(cu, launch.name, status)

    def copy_from(self, other: Context, target: int, source: int, nbytes: int) -> None:
        """Queue a copy from the memory of another GPU. pycuda's peer copy would use the current
        context for both."""
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
    """The kernel of a cubin; its module stays loaded as long as the context exists."""
    cu = imported("cuda.bindings.driver")
    what = f"loading {cubin.name}"
    module = _checked(cu, what, cu.cuModuleLoadData(cubin.code))
    return _checked(cu, what, cu.cuModuleGetFunction(module, cubin.symbol.encode()))


def _checked(cu: Any, what: str, answer: tuple[Any, ...]) -> Any:
    """The result of a cuda-bindings call; DeviceError if it failed."""
    status, *results = answer
    if status == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemoryError(f"{what}: {status.name}")
    if status != cu.CUresult.CUDA_SUCCESS:
        text = status.name.lower().replace("_", " ")
        raise DeviceError(f"{what}: {status.name}. {_advice(text)}")
    return results[0] if results else None


def _described(handle: Any, api: Any) -> Device:
    """The properties of a GPU that kernels may depend on; DeviceError if it is too old."""
    capability = handle.compute_capability()
    if capability < OLDEST:
        raise DeviceError(
            f"{handle.name()} has compute capability {'.'.join(map(str, capability))}; "
            f"the kernels need {'.'.join(map(str, OLDEST))} (Ampere) or newer"
        )
    attribute, read = api.device_attribute, handle.get_attribute
    # From 9.0 on, the "a" target enables instructions specific to an architecture.
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
    """The context of GPU `index`, opened once."""
    return Context(index)
