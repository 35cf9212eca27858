"""Keys of DeepSeek-2 files for tests, and hyperparameters read from them."""

from __future__ import annotations

import warnings
from typing import Any

from pyggml.models.deepseek2 import DeepSeek2
from pyggml.models.presets import V3
from tests.models.stand_ins import Changes, file_of


def read(base: DeepSeek2 = V3, tensors: Changes | None = None, **keys: Any) -> DeepSeek2:
    """The hyperparameters in a file of `base`, some keys and tensors of it replaced or (None)
    removed; __ stands for a dot.
    """
    return DeepSeek2.of(file_of(base, {k.replace("__", "."): v for k, v in keys.items()}, tensors))


def quietly(base: DeepSeek2 = V3, tensors: Changes | None = None, **keys: Any) -> DeepSeek2:
    """`read`; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read(base, tensors, **keys)
