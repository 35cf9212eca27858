"""One GPU: its primary context, shared with CuPy and PyTorch, its stream, its loaded kernels.

pycuda opens the context and manages streams, events and memory; cuda-bindings loads and launches
kernels, because pycuda's launches take no attributes.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

from pyggml.backends.base import Peers
from pyggml.backends.cuda.device import kernel_cache
from pyggml.backends.cuda.device.compiler import Cubin
from pyggml.backends.cuda.device.driver import checked, driver, guarded, imported
from pyggml.backends.cuda.device.nccl import Communicator, Watch
from pyggml.backends.cuda.gpu import Device
from pyggml.backends.cuda.launch import Launch
from pyggml.errors import DeviceError

#: The oldest compute capability that the kernels support.
OLDEST = (8, 0)
#: Bytes of shared memory that a block may use by default, static ones included.
FREE_SHARED = 48 * 1024
#: CU_STREAM_NON_BLOCKING, which pycuda has no name for.
NON_BLOCKING = 1


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
        #: Places that meet in joint steps -> this GPU's end.
        self.communicators: dict[tuple[str, ...], Communicator] = {}
        self.room: Any = None  # a block that buffers are cut from (memory.py)
        self.peers: Peers | None = None  # processes that its queue may wait for
        self._idle: Any = None
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

    def wait(self, point: Any) -> None:
        """Wait for an event or a stream of pycuda. If the queue may wait for other GPUs or
        processes, their errors end it."""
        ends = tuple(self.communicators.values())
        if self.peers is None and all(len(end.mates) == 1 for end in ends):
            point.synchronize()
            return
        is_done = point.query if hasattr(point, "query") else point.is_done
        watch, turns = Watch(self.peers, ends), 0
        try:
            while not is_done():
                turns += 1
                if turns % 64 == 0:
                    watch.look()
                if turns > 20_000:  # a long wait: leave the processor to others
                    time.sleep(1e-4)
        except self.driver.Error:  # of this GPU: the others would wait for it
            for end in ends:
                end.abort()
            raise

    def check_alive(self) -> None:
        """DeviceError if an earlier kernel has failed, after which the GPU does nothing more.

        A stream of its own says so, because a query would end the capture of another one.
        """
        with self, guarded(f"a run on cuda:{self.index}, which others wait for"):
            if self._idle is None:
                self._idle = self.driver.Stream(NON_BLOCKING)
            self._idle.is_done()

    @cached_property
    def loads(self) -> Any:
        """The stream of weights that are read ahead. A whole run waits for them in `stream`."""
        with self:
            return self.driver.Stream()

    def wait_for_loads(self) -> None:
        """Wait for weights that are read ahead, after a run that may not have come to that."""
        if "loads" in vars(self):
            self.wait(self.loads)

    def leave(self) -> None:
        """End what waits for other devices: they will not come."""
        for end in self.communicators.values():
            end.abort()
        self.communicators = {}

    # -- by cuda-bindings ---------------------------------------------------------------------

    def load(self, launches: Sequence[Launch]) -> None:
        """Compile (or take from the cache) and load every kernel of these launches."""
        keys = dict.fromkeys((launch.file, launch.name) for launch in launches)
        new = [key for key in keys if key not in self._functions]
        for key, cubin in kernel_cache.cubins(new, self.about.arch).items():
            self._functions[key] = _function(cubin)
            self._shared[key] = FREE_SHARED - cubin.shared
        for key in {(launch.file, launch.name) for launch in launches if launch.roomy} & {*new}:
            self._make_roomy(key)
        for launch in launches:
            self._allow_shared(launch)

    def _make_roomy(self, key: tuple[str, str]) -> None:
        """Let a multiprocessor that runs the kernel share as much memory as it can. It changes that
        only when it is empty, so blocks of the next launch would wait for the last of these."""
        cu = imported("cuda.bindings.driver")
        share = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        checked(cu, key[1], cu.cuFuncSetAttribute(self._functions[key], share, 100))

    def _allow_shared(self, launch: Launch) -> None:
        """Allow a kernel more than the default dynamic shared memory."""
        key = launch.file, launch.name
        if launch.shared <= self._shared[key]:
            return
        cu = imported("cuda.bindings.driver")
        limit = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        what = f"{launch.name}: {launch.shared} bytes of shared memory"
        checked(cu, what, cu.cuFuncSetAttribute(self._functions[key], limit, launch.shared))
        self._shared[key] = launch.shared

    def start(self, launch: Launch, stream: Any = None) -> None:
        """Queue a loaded kernel, by default in the device's own stream."""
        cu = imported("cuda.bindings.driver")
        config = cu.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block
        config.sharedMemBytes = launch.shared
        config.hStream = cu.CUstream((stream or self.stream).handle)
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
        checked(cu, launch.name, status)

    def copy_from(self, other: Context, target: int, source: int, nbytes: int) -> None:
        """Queue a copy from the memory of another GPU. pycuda's peer copy would use the current
        context for both."""
        cu = imported("cuda.bindings.driver")
        what = f"copying from cuda:{other.index} to cuda:{self.index}"
        with other:
            theirs = checked(cu, what, cu.cuCtxGetCurrent())
        with self:
            mine = checked(cu, what, cu.cuCtxGetCurrent())
            stream = cu.CUstream(self.stream.handle)
            status = cu.cuMemcpyPeerAsync(target, mine, source, theirs, nbytes, stream)
            checked(cu, what, status)


def _function(cubin: Cubin) -> Any:
    """The kernel of a cubin; its module stays loaded as long as the context exists."""
    cu = imported("cuda.bindings.driver")
    what = f"loading {cubin.name}"
    module = checked(cu, what, cu.cuModuleLoadData(cubin.code))
    return checked(cu, what, cu.cuModuleGetFunction(module, cubin.symbol.encode()))


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
