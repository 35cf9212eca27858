"""The null backend: devices that stand in for GPUs, in tests and in planning.

Each device has private memory, a private layout of weights, and a queue that runs its work as late
as possible. It computes with NumPy's kernels, so its results equal NumPy's bit for bit. It is meant
for tests; it is slower than NumPy.
"""

from __future__ import annotations

from functools import cache

from pyggml.backends.null.device import NullDevice


@cache
def device(index: int) -> NullDevice:
    """The device `null:index`, for any index."""
    return NullDevice(index)


__all__ = ["NullDevice", "device"]
