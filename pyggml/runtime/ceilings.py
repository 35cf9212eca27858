"""What a device can do, measured with plans of two ops: a large copy and a large product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyggml.errors import OutOfMemoryError
from pyggml.node import Node
from pyggml.ops import constant, input, mul_mat, scale
from pyggml.runtime.places import parse


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured on a kind of device.

    copied   bytes that the copy reads: more than caches have
    product  rows and columns of the product's weights, and columns of its activations
    types    of the weights; the fastest counts
    """

    copied: int
    product: tuple[int, int, int]
    types: tuple[str, ...]


HOST = Sizes(64 << 20, (1024, 1024, 256), ("f32", "q8_0"))
DEVICE = Sizes(128 << 20, (4096, 4096, 4096), ("f16",))
RUNS = 5


@dataclass(frozen=True, slots=True)
class Ceiling:
    """copy: bytes read and written a second; product: floating-point operations a second."""

    copy: float
    product: float


def ceiling(place: str) -> Ceiling | None:
    """The ceiling of the device at a place; None if its memory is full."""
    sizes = HOST if parse(place).backend.device == "host" else DEVICE
    n, m, columns = sizes.product
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((m, n), dtype=np.float32)
    x = input("x", ne=(n, columns))
    array = rng.standard_normal((columns, n), dtype=np.float32)
    large = np.zeros((sizes.copied // 4096, 1024), np.float32)
    copied = input("x", ne=large.shape[::-1])
    try:
        copy = 2 * large.nbytes / _seconds(place, scale(copied, s=2.0), large)
        product = 0.0
        for kind in sizes.types:
            node = mul_mat(constant(weights, dtype=kind, name="w"), x)
            product = max(product, 2.0 * n * m * columns / _seconds(place, node, array))
    except OutOfMemoryError:
        return None
    return Ceiling(copy, product)


def _seconds(place: str, node: Node, array: np.ndarray) -> float:
    """The time of the only step inside a run."""
    from pyggml.runtime.compile import compile

    profile = compile({"y": node}, backends=[place]).profile({"x": array}, RUNS)
    return profile.seconds
