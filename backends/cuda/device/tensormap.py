"""Tensor maps: descriptions of tensors for the tensor copy engine of compute capability 9.0."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.device.driver import imported
from pyggml.errors import DeviceError

_TYPES = {
    "f16": "CU_TENSOR_MAP_DATA_TYPE_FLOAT16",
    "bf16": "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16",
    "f32": "CU_TENSOR_MAP_DATA_TYPE_FLOAT32",
    "u32": "CU_TENSOR_MAP_DATA_TYPE_UINT32",
}


class TensorMap(Struct):
    """The struct `TensorMap` of mma.cuh, the driver's CUtensorMap. In kernel arguments it must be
    64-byte aligned."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


#: In place of a map that a kernel does not read, or where there is no driver to make it.
EMPTY = TensorMap(opaque=(0,) * 16)


def steps_of(ne: Sequence[int], nb: Sequence[int]) -> list[int]:
    """The byte strides for a map. The stride of a size of 1 has no meaning, but the map requires a
    multiple of 16, so it is replaced."""
    steps = [16 * -(-ne[0] * nb[0] // 16)]
    for n, step in zip(ne[1:], nb[1:]):
        steps.append(step if n > 1 else steps[-1])
    return steps[1:]


def tensor_map(
    ptr: int,
    dtype: str,
    ne: Sequence[int],
    nb: Sequence[int],
    box: Sequence[int],
    swizzle: bool = True,
) -> TensorMap:
    """A map for copying boxes of a tensor; elements outside `ne` read as zeros.

    ptr      must be a multiple of 16, like the byte strides nb[1:] of sizes above 1
    box      elements per copy; at most 256 of each dimension
    swizzle  128-byte swizzle, with which box[0] must not exceed 128 bytes
    """
    driver = imported("cuda.bindings.driver")
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    steps = steps_of(ne, nb)
    status, encoded = driver.cuTensorMapEncodeTiled(
        getattr(driver.CUtensorMapDataType, _TYPES[dtype]),
        len(ne),
        ptr,
        [u64(n) for n in ne],
        [u64(step) for step in steps],
        [u32(n) for n in box],
        [u32(1)] * len(ne),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(
            driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{'128B' if swizzle else 'NONE'}"
        ),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(
            f"cannot make a tensor map of {dtype} {list(ne)}, strides {steps}: {status.name}"
        )
    return TensorMap.from_buffer_copy(ctypes.string_at(encoded.getPtr(), ctypes.sizeof(TensorMap)))
