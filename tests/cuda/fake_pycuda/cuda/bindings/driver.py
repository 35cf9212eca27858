"""The part of cuda.bindings.driver that pyggml calls, on the fake pycuda. Of the kernels only
that of relay.cu runs, because it copies."""

from __future__ import annotations

import ctypes
import enum
import mmap
import struct
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pycuda.driver as pycuda


class CUresult(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2


OK = CUresult.CUDA_SUCCESS


class CUdevice_attribute(enum.Enum):
    CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91
    CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED = 113


CU_MEMHOSTREGISTER_DEVICEMAP = 2
CU_MEMHOSTREGISTER_READ_ONLY = 8
#: Registered memory: address -> bytes.
REGISTERED: dict[int, int] = {}
#: Whether the GPU can read registered memory at the host's addresses.
REGISTERS = [True]


class CUfunction_attribute(enum.Enum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
    CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT = 9


class CUlaunchAttributeID(enum.Enum):
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class CUlaunchAttribute:
    def __init__(self) -> None:
        self.id: Any = None
        self.value = SimpleNamespace()


class CUlaunchConfig:
    attrs: tuple[CUlaunchAttribute, ...] = ()
    numAttrs = 0


@dataclass
class Function:
    """A kernel. `allowed` lists the bytes of dynamic shared memory that were requested for it,
    `shares` how much of a multiprocessor's memory it prefers to be shared, in percent."""

    symbol: str
    code: bytes
    allowed: list[int] = field(default_factory=list)
    shares: list[int] = field(default_factory=list)


@dataclass
class Started:
    function: Function
    config: CUlaunchConfig
    args: bytes


STARTED: list[Started] = []


def CUstream(handle: int) -> pycuda.Stream:
    return next(stream for stream in pycuda.Stream.all if stream.handle == handle)


def cuCtxGetCurrent() -> tuple[CUresult, pycuda.Context]:
    return OK, pycuda.Context.stack[-1]


def cuMemcpyPeerAsync(
    target: int,
    here: pycuda.Context,
    source: int,
    there: pycuda.Context,
    nbytes: int,
    stream: pycuda.Stream,
) -> tuple[CUresult]:
    pycuda.memcpy_dtod_async(target, source, nbytes, stream)
    pycuda.CALLS[-1] = f"{there.index} to {here.index}"
    return (OK,)


#: Whether GPUs reach each other's memory.
PEERS = [False]
#: The addresses of memory of other processes that is open.
OPENED: list[int] = []


def cuDeviceGet(index: int) -> tuple[CUresult, int]:
    return OK, index


def cuDeviceCanAccessPeer(device: int, other: int) -> tuple[CUresult, int]:
    return OK, int(PEERS[0])


@dataclass
class CUipcMemHandle:
    reserved: bytes = b""


class CUipcMem_flags(enum.Enum):
    CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1


def cuIpcGetMemHandle(ptr: int) -> tuple[CUresult, CUipcMemHandle | None]:
    if not PEERS[0]:
        return CUresult.CUDA_ERROR_INVALID_VALUE, None
    return OK, CUipcMemHandle(ptr.to_bytes(64, "little"))


def cuIpcOpenMemHandle(handle: CUipcMemHandle, flags: int) -> tuple[CUresult, int]:
    address = int.from_bytes(handle.reserved, "little")
    OPENED.append(address)
    return OK, address


def cuIpcCloseMemHandle(address: int) -> tuple[CUresult]:
    OPENED.remove(address)
    return (OK,)


def cuMemsetD32Async(ptr: int, value: int, count: int, stream: pycuda.Stream) -> tuple[CUresult]:
    ctypes.c_uint32.from_address(ptr).value = value
    return (OK,)


def cuDeviceGetAttribute(attribute: CUdevice_attribute, device: int) -> tuple[CUresult, int]:
    return OK, int(REGISTERS[0])


def cuMemHostRegister(ptr: int, nbytes: int, flags: int) -> tuple[CUresult]:
    assert flags == CU_MEMHOSTREGISTER_DEVICEMAP | CU_MEMHOSTREGISTER_READ_ONLY
    assert pycuda.Context.stack, "no context is current"
    taken = any(ptr < at + size and at < ptr + nbytes for at, size in REGISTERED.items())
    if taken or ptr % mmap.PAGESIZE or nbytes % mmap.PAGESIZE:
        return (CUresult.CUDA_ERROR_INVALID_VALUE,)
    REGISTERED[ptr] = nbytes
    return (OK,)


def cuMemHostUnregister(ptr: int) -> tuple[CUresult]:
    del REGISTERED[ptr]
    return (OK,)


def cuModuleLoadData(code: bytes) -> tuple[CUresult, bytes]:
    assert pycuda.Context.stack, "no context is current"
    return OK, code


def cuModuleGetFunction(module: bytes, symbol: bytes) -> tuple[CUresult, Function]:
    return OK, Function(symbol.decode(), module)


def cuFuncSetAttribute(
    function: Function, attribute: CUfunction_attribute, value: int
) -> tuple[CUresult]:
    if value > pycuda.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        return (CUresult.CUDA_ERROR_INVALID_VALUE,)
    share = attribute is CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    (function.shares if share else function.allowed).append(value)
    return (OK,)


def cuLaunchKernelEx(
    config: CUlaunchConfig, function: Function, params: int, extra: int
) -> tuple[CUresult]:
    assert pycuda.Context.stack, "no context is current"
    _, buffer, _, size, end = (ctypes.c_uint64 * 5).from_address(extra)
    assert params == end == 0
    nbytes = ctypes.c_size_t.from_address(size).value
    started = Started(function, config, ctypes.string_at(buffer, nbytes))
    STARTED.append(started)
    if function.code.startswith(b"relay.cu"):
        action = partial(_relay, started)
        CAPTURES[-1].append(action) if CAPTURES else config.hStream.queue.add(action)
    elif CAPTURES:
        CAPTURES[-1].append(None)
    return (OK,)


def _relay(started: Started) -> None:
    """What the kernel does: each block copies a tensor."""
    for block in range(started.config.gridDimX):
        to, source, nbytes = struct.unpack_from("QQi", started.args, 24 * block)
        ctypes.memmove(to, source, nbytes)


# -- events in graphs -------------------------------------------------------------------------

#: Graphs being captured: None is a kernel, an event its record, a function copies. Tests replay
#: them.
CAPTURES: list[list[Any]] = []


class CUevent_flags(enum.Enum):
    CU_EVENT_DEFAULT = 0


class CUevent_record_flags(enum.Enum):
    CU_EVENT_RECORD_EXTERNAL = 1


@dataclass(eq=False)
class Event:
    """An event with timing; `time` is in milliseconds."""

    time: float | None = None


EVENTS: list[Event] = []


def cuEventCreate(flags: int) -> tuple[CUresult, Event]:
    assert flags == CUevent_flags.CU_EVENT_DEFAULT.value, "an event without timing has no times"
    assert pycuda.Context.stack, "no context is current"
    assert not CAPTURES, "an event is created during a capture"
    EVENTS.append(Event())
    return OK, EVENTS[-1]


def cuEventDestroy(event: Event) -> tuple[CUresult]:
    EVENTS.remove(event)
    return (OK,)


def cuEventRecordWithFlags(event: Event, stream: pycuda.Stream, flags: int) -> tuple[CUresult]:
    assert flags == CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL.value
    if not CAPTURES:  # external records are only for captures
        return (CUresult.CUDA_ERROR_INVALID_VALUE,)
    CAPTURES[-1].append(event)
    return (OK,)


def cuEventElapsedTime(start: Event, end: Event) -> tuple[CUresult, float]:
    if start.time is None or end.time is None:
        return CUresult.CUDA_ERROR_INVALID_VALUE, 0.0
    return OK, end.time - start.time
