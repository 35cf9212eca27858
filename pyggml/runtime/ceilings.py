"""What a device can do, measured with plans of two ops: a large copy and a large product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyggml.errors import OutOfMemoryError
from pyggml.node import Node
from pyggml.ops import constant, input, mul_mat, scale
from pyggml.runtime.places import parse

#: Bytes that the copy reads, on the host and on devices: more than their caches have.
COPY = {True: 64 << 20, False: 128 << 20}
#: Rows and columns of the product's weights, and columns of its activations.
PRODUCT = {True: (1024, 1024, 256), False: (4096, 4096, 4096)}
#: Types of the weights; the fastest counts.
TYPES = {True: ("f32", "q8_0"), False: ("f16",)}
RUNS = 5


@dataclass(frozen=True, slots=True)
class Ceiling:
    """copy: bytes read and written a second; product: floating-point operations a second."""

    copy: float
    product: float


def ceiling(place: str) -> Ceiling | None:
    """The ceiling of the device at a place; None if its memory is full."""
    host = parse(place).backend.device == "host"
    n, m, columns = PRODUCT[host]
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((m, n), dtype=np.float32)
    x = input("x", ne=(n, columns))
    array = rng.standard_normal((columns, n), dtype=np.float32)
    large = np.zeros((COPY[host] // 4096, 1024), np.float32)
    copied = input("x", ne=large.shape[::-1])
    try:
        copy = 2 * large.nbytes / _seconds(place, scale(copied, s=2.0), large)
        product = 0.0
        for kind in TYPES[host]:
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
