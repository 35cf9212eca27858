"""Matrices as NVFP4 quantizers store them, computed without pyggml.

A value is factor x scale x level: the factor is f32, one for a matrix or for an expert; the scale
is e4m3, one for 16 values; the level is e2m1. A file has the factors as NAME.scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
MAX_SCALE = 448  # of e4m3


def factors_of(values: Array) -> Array:
    """The factor with which the largest value of each matrix has the largest scale."""
    return np.abs(values).max(axis=(-2, -1), keepdims=True) / (LEVELS[-1] * MAX_SCALE)


def quantize(values: Array) -> tuple[Array, Array]:
    """ggml's blocks of the rows, and the values that they stand for."""
    groups = values.reshape(*values.shape[:-1], -1, 16)
    scales = torch.from_numpy(np.abs(groups).max(axis=-1, keepdims=True) / LEVELS[-1])
    e4m3 = scales.to(torch.float8_e4m3fn)
    scale = e4m3.float().numpy()
    ratios = np.abs(groups) / np.maximum(scale, np.float32(1e-30))
    codes = np.abs(ratios[..., None] - LEVELS).argmin(axis=-1)
    decoded = np.copysign(LEVELS[codes] * scale, groups).reshape(values.shape)
    nibbles = (codes + 8 * (groups < 0)).astype(np.uint8)
    packed = nibbles[..., :8] | nibbles[..., 8:] << 4
    blocks = (*values.shape[:-1], -1)
    parts = [e4m3.view(torch.uint8).numpy().reshape(*blocks, 4), packed.reshape(*blocks, 32)]
    return np.concatenate(parts, axis=-1).reshape(blocks), decoded
