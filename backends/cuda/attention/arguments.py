"""The arguments of the attention kernels: `Attention`, alone and with tensor maps before it."""

from __future__ import annotations

import ctypes

from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.device.tensormap import TensorMap


class Attention(Struct):
    """The struct `Attention` of attention.cuh: addresses (0: absent), byte strides, sizes."""

    _fields_ = (
        ("q", ctypes.c_uint64),
        ("k", ctypes.c_uint64),
        ("v", ctypes.c_uint64),
        ("mask", ctypes.c_uint64),
        ("sinks", ctypes.c_uint64),
        ("kv_len", ctypes.c_uint64),
        ("pos", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("parts", ctypes.c_uint64),
        ("stats", ctypes.c_uint64),
        ("map", ctypes.c_uint64),
        ("ids", ctypes.c_uint64),
        ("nb_q", ctypes.c_int64 * 3),
        ("nb_k", ctypes.c_int64 * 3),
        ("nb_v", ctypes.c_int64 * 3),
        ("nb_mask", ctypes.c_int64 * 4),
        ("nb_out", ctypes.c_int64 * 3),
        ("nb_ids", ctypes.c_int64 * 3),
        ("nb_sinks", ctypes.c_int64),
        ("nb_pos", ctypes.c_int64),
        ("n_q", ctypes.c_int32),
        ("n_kv", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("heads_kv", ctypes.c_int32),
        ("n3", ctypes.c_int32),
        ("d_k", ctypes.c_int32),
        ("d_v", ctypes.c_int32),
        ("mask_heads", ctypes.c_int32),
        ("mask_batch", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("kv0", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("head0", ctypes.c_int32),
        ("n_head", ctypes.c_int32),
        ("lse", ctypes.c_int32),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("v_start", ctypes.c_int32),
        ("n_ids", ctypes.c_int32),
        ("pitch", ctypes.c_int32),
        ("stride", ctypes.c_int32),
        ("early", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("max_bias", ctypes.c_float),
    )


class HopperArgument(Struct):
    """The struct `HopperArgument` of attention_hopper.cu. `pad` aligns the maps to 64 bytes: kernel
    parameters start at 0x210 on 9.0."""

    _fields_ = (
        ("pad", ctypes.c_uint64 * 6),
        ("map_k", TensorMap),
        ("map_v", TensorMap),
        ("a", Attention),
        ("scales", ctypes.c_uint64),
    )


class LatentArgument(Struct):
    """The struct `LatentArgument` of attention_latent_hopper.cu, padded like `HopperArgument`."""

    _fields_ = (("pad", ctypes.c_uint64 * 6), ("map", TensorMap), ("a", Attention))
