"""GGUF files: `open` reads them through a memory map, `write` makes them."""

from __future__ import annotations

from pyggml.gguf.format import StringArray, TensorInfo, Value
from pyggml.gguf.reader import GGUFFile, open
from pyggml.gguf.writer import Tensor, write

__all__ = ["GGUFFile", "StringArray", "Tensor", "TensorInfo", "Value", "open", "write"]
