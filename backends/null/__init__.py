"""The null backend: devices that stand in for GPUs, in tests and in planning.

Each has memory of its own that nothing else can read, keeps weights in a layout of its own, and
runs what is put into its queue as late as it may. It computes through NumPy, so its results are
NumPy's, bit for bit; it is slow on purpose and never worth choosing for speed.
"""

from __future__ import annotations

from functools import cache

from pyggml.backends.null.device import NullDevice


@cache
def device(index: int) -> NullDevice:
    """The device `null:index`; there are as many as are asked for."""
    return NullDevice(index)


__all__ = ["NullDevice", "device"]
