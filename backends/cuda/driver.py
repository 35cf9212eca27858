"""One GPU: its primary context, shared with CuPy and PyTorch, its stream, its loaded kernels.

pycuda is imported here, on first use. Whatever goes wrong is a DeviceError that says what to do.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from pyggml.backends.cuda import compiler
from pyggml.backends.cuda.launch import Device, Launch
from pyggml.errors import DeviceError, OutOfMemoryError

#: The oldest compute capability that the kernels are written for.
OLDEST = (8, 0)
#: Dynamic shared memory that a block has without asking for more.
FREE_SHARED = 48 * 1024
_DOCTOR = "`pyggml doctor` says what is missing"


@cache
def driver() -> Any:
    """pycuda.driver, initialised; DeviceError without pycuda, without a driver, with an old one."""
    try:
        with warnings.catch_warnings(action="ignore"):  # pycuda's guess at why it cannot load
            import pycuda.driver as found
    except ModuleNotFoundError as error:
        raise DeviceError(
            f"the CUDA backend needs pycuda, and the module {error.name} is not installed: "
            f"pip install pyggml[cuda], or tools/build_pycuda.sh where that fails; {_DOCTOR}"
        ) from None
    except ImportError as error:
        raise DeviceError(
            f"no NVIDIA driver here ({error}): install one of version 580 or newer, or run on "
            f"backends=['numpy']; {_DOCTOR}"
        ) from None
    version, needed = found.get_driver_version(), 1000 * compiler.nvrtc_version()[0]
    if version < needed:
        raise DeviceError(
            f"the NVIDIA driver is too old: it speaks CUDA {_spoken(version)}, the kernels need "
            f"{_spoken(needed)}. Update the driver, or install an older NVRTC; {_DOCTOR}"
        )
    try:
        found.init()
    except found.Error as error:
        raise DeviceError(f"no CUDA device can be used: {error}; {_DOCTOR}") from None
    return found


def _spoken(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """pycuda's errors as ours; `what` was being done."""
    found = driver()
    try:
        yield
    except found.MemoryError as error:
        raise OutOfMemoryError(f"{what}: {error}") from None
    except found.Error as error:
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
            raise DeviceError(f"there is no cuda:{index}; GPUs here: {there}")
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
        import cupy

        return cupy.cuda.ExternalStream(self.stream.handle, self.index)

    def load(self, launches: Sequence[Launch]) -> None:
        """Compile (or find compiled) and load every kernel of these launches."""
        wanted = [(one.file, one.name) for one in launches]
        new = [key for key in dict.fromkeys(wanted) if key not in self._functions]
        for key, made in compiler.cubins(new, self.about.arch).items():
            with guarded(f"loading {key[1]}"):
                module = self.driver.module_from_buffer(made.code)
                self._modules.append(module)
                self._functions[key] = module.get_function(made.symbol)
        for one in launches:
            if one.cluster or one.overlap:
                self._load_raw(one)
            elif one.shared > FREE_SHARED:
                attribute = self.driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
                function = self._functions[one.file, one.name]
                with guarded(f"{one.name}: {one.shared} bytes of shared memory"):
                    if function.get_attribute(attribute) < one.shared:
                        function.set_attribute(attribute, one.shared)

    def start(self, one: Launch) -> None:
        """Put a loaded kernel into the stream."""
        if one.cluster or one.overlap:
            self._start_raw(one)
            return
        function = self._functions[one.file, one.name]
        function._launch_kernel(one.grid, one.block, one.args, one.shared, self.stream)

    # -- what pycuda lacks: launches with attributes ------------------------------------------

    def _load_raw(self, one: Launch) -> None:
        from cuda.bindings import driver as cu

        key = one.file, one.name
        if key not in self._raw:
            made = compiler.cubin(*key, self.about.arch)
            module = _asked(cu, f"loading {one.name}", cu.cuModuleLoadData(made.code))
            symbol = made.symbol.encode()
            self._raw[key] = _asked(cu, one.name, cu.cuModuleGetFunction(module, symbol))
        attribute = cu.CUfunction_attribute
        wanted = []
        if one.cluster:
            wanted.append((attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1))
        if one.shared > FREE_SHARED:
            limit = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._shared[key] = max(one.shared, self._shared.get(key, 0))
            wanted.append((limit, self._shared[key]))
        for name, value in wanted:
            _asked(cu, one.name, cu.cuFuncSetAttribute(self._raw[key], name, value))

    def _start_raw(self, one: Launch) -> None:
        from cuda.bindings import driver as cu

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
