"""One GPU: its primary context, shared with CuPy and PyTorch, its stream, its loaded kernels.

pycuda is imported here, on first use. Whatever goes wrong is a DeviceError that says what to do.
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
        self._functions: dict[tuple[str, str], Any] = {}
        self._raw: dict[tuple[str, str], Any] = {}
        self._shared: dict[tuple[str, str], int] = {}  # dynamic bytes that were asked for
        self._modules: list[Any] = []
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

    def load(self, launches: Sequence[Launch]) -> None:
        """Compile (or find compiled) and load every kernel of these launches."""
        wanted = {(one.file, one.name): one for one in launches}
        new = [key for key in wanted if key not in self._functions and key not in self._raw]
        for key, made in compiler.cubins(new, self.about.arch).items():
            with guarded(f"loading {key[1]}"):
                if _has_attributes(wanted[key]):
                    self._raw[key] = _raw_function(made)
                    continue
                module = self.driver.module_from_buffer(made.code)
                self._modules.append(module)
                self._functions[key] = module.get_function(made.symbol)
        for one in launches:
            if _has_attributes(one):
                self._allow(one)
            elif one.shared > FREE_SHARED:
                attribute = self.driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
                function = self._functions[one.file, one.name]
                with guarded(f"{one.name}: {one.shared} bytes of shared memory"):
                    if function.get_attribute(attribute) < one.shared:
                        function.set_attribute(attribute, one.shared)

    def start(self, one: Launch) -> None:
        """Put a loaded kernel into the stream."""
        if _has_attributes(one):
            self._start_raw(one)
            return
        function = self._functions[one.file, one.name]
        function._launch_kernel(one.grid, one.block, one.args, one.shared, self.stream)

    # -- what pycuda lacks: copies that name two GPUs, launches with attributes -----------------

    def copy_from(self, other: Context, target: int, source: int, nbytes: int) -> None:
        """Queue a copy from the memory of another GPU; pycuda's takes both for the current one."""
        cu = imported("cuda.bindings.driver")
        what = f"copying from cuda:{other.index} to cuda:{self.index}"
        with other:
            theirs = _asked(cu, what, cu.cuCtxGetCurrent())
        with self:
            mine = _asked(cu, what, cu.cuCtxGetCurrent())
            stream = cu.CUstream(self.stream.handle)
            made = cu.cuMemcpyPeerAsync(target, mine, source, theirs, nbytes, stream)
            _asked(cu, what, made)

    def _allow(self, one: Launch) -> None:
        """Cluster sizes and shared memory that a function may have only when asked for."""
        cu = imported("cuda.bindings.driver")
        key = one.file, one.name
        attribute = cu.CUfunction_attribute
        wanted = []
        if one.cluster:
            wanted.append((attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1))
        if one.shared > FREE_SHARED:
            limit = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            if one.shared > self._shared.get(key, 0):
                wanted.append((limit, one.shared))
        for name, value in wanted:
            _asked(cu, one.name, cu.cuFuncSetAttribute(self._raw[key], name, value))
        self._shared[key] = max(one.shared, self._shared.get(key, 0))  # once it is so

    def _start_raw(self, one: Launch) -> None:
        cu = imported("cuda.bindings.driver")
        config = cu.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = one.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = one.block
        config.sharedMemBytes = one.shared
        config.hStream = cu.CUstream(self.stream.handle)
        attributes = []
        if one.cluster:
            attribute = cu.CUlaunchAttribute()
            attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attribute.value.clusterDim
            size.x, size.y, size.z = one.cluster
            attributes.append(attribute)
        if one.overlap:
            attribute = cu.CUlaunchAttribute()
            kinds = cu.CUlaunchAttributeID
            attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        # The arguments as one buffer: POINTER 1, SIZE 2, END 0.
        held, size = ctypes.create_string_buffer(one.args), ctypes.c_size_t(len(one.args))
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(held), 2, ctypes.addressof(size), 0)
        function = self._raw[one.file, one.name]
        made = cu.cuLaunchKernelEx(config, function, 0, ctypes.addressof(extra))
        _asked(cu, one.name, made)


def _has_attributes(one: Launch) -> bool:
    """Whether its launch has attributes, which pycuda's has not."""
    return one.overlap or one.cluster is not None


def _raw_function(made: compiler.Cubin) -> Any:
    cu = imported("cuda.bindings.driver")
    module = _asked(cu, "loading a module", cu.cuModuleLoadData(made.code))
    return _asked(cu, made.symbol, cu.cuModuleGetFunction(module, made.symbol.encode()))


def _asked(cu: Any, what: str, answer: tuple[Any, ...]) -> Any:
    """The result of a call of cuda.bindings; DeviceError where it failed."""
    status, *found = answer
    if status != cu.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"{what}: {status.name}. {_advice(status.name.lower())}")
    return found[0] if found else None


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
