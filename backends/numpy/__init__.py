"""The NumPy backend: the default, and the plain meaning of every operation in arrays."""

from __future__ import annotations

from pyggml.backends.numpy.backend import NumpyBackend
from pyggml.backends.numpy.table import kernel

backend = NumpyBackend()

__all__ = ["backend", "kernel"]
