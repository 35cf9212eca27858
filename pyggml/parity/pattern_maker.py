"""What the graphs that test fusion are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyggml.node import Node
from pyggml.ops.leaf import constant
from pyggml.ops.leaf import input as input_

#: Tokens.
T = 5


@dataclass(frozen=True, slots=True)
class Pattern:
    """Outputs by name, and arrays for the inputs in NumPy shape."""

    outputs: dict[str, Node]
    inputs: Mapping[str, NDArray[np.generic]]


class Maker:
    """Makes leaves, with values from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.inputs: dict[str, NDArray[np.generic]] = {}

    def floats(self, name: str, *ne: int, type: str = "f32") -> Node:
        self.inputs[name] = self.rng.standard_normal(ne[::-1]).astype("f4")
        return input_(name, type, ne=ne)

    def weight(self, name: str, *ne: int, type: str = "f32") -> Node:
        values = self.rng.standard_normal(ne[::-1]).astype("f4") / 16
        return constant(values, dtype=type, name=name)

    def positions(self, name: str = "pos", start: int = 3) -> Node:
        self.inputs[name] = np.arange(start, start + T, dtype="i4")
        return input_(name, "i32", ne=(T,))

    def ids(self, name: str, *ids: int) -> Node:
        self.inputs[name] = np.array(ids, np.int32)
        return input_(name, "i32", ne=(len(ids),))

    def done(self, **outputs: Node) -> Pattern:
        return Pattern(outputs, self.inputs)
