"""Keys of DeepSeek-2 files for tests, and configurations read from them."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from pyggml.models.config import DeepSeek2Config
from pyggml.models.presets import PRESETS, config_fields

LITE, V3 = PRESETS["deepseek-v2-lite"], PRESETS["deepseek-v3"]


def fields_of(base: DeepSeek2Config = V3, **keys: Any) -> dict[str, Any]:
    """The keys of `base`, some of them replaced or (None) removed; __ stands for a dot."""
    fields = config_fields(base)
    for name, value in keys.items():
        fields[f"deepseek2.{name.replace('__', '.')}"] = value
    return {key: value for key, value in fields.items() if value is not None}


def config_of(fields: dict[str, Any], tensors: Collection[str] = ()) -> DeepSeek2Config:
    """The configuration; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return DeepSeek2Config.from_gguf(fields, tensors)
