"""The NumPy backend: the default, and the reference for all others."""

from __future__ import annotations

from functools import cache

from pyggml.backends.numpy.backend import NumpyBackend
from pyggml.backends.numpy.table import kernel


@cache
def device(index: int) -> NumpyBackend:
    """The host (0), or one of several parts of it for `shard=`."""
    return NumpyBackend(index)


__all__ = ["device", "kernel"]
