"""GGUF files: `open` memory-maps and reads them, `write` writes them."""

from __future__ import annotations

from pyggml.gguf.format import StringArray, TensorInfo, Value
from pyggml.gguf.reader import GGUFFile, open
from pyggml.gguf.writer import Tensor, write

__all__ = ["GGUFFile", "StringArray", "Tensor", "TensorInfo", "Value", "open", "write"]
