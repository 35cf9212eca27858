"""The backend object: NumPy's kernels in host memory."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pyggml.backends.host import HostBackend
from pyggml.backends.host_memory import DECODED
from pyggml.backends.numpy.decoded import decoded, layout_of
from pyggml.backends.numpy.table import KERNELS
from pyggml.backends.step import Buffer, WeightLayout
from pyggml.node import Node

# Importing a module registers its kernels.
for _module in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if _module.name != "backend":
        importlib.import_module(f"pyggml.backends.numpy.{_module.name}")


class NumpyBackend(HostBackend):
    """The host with NumPy's kernels."""

    name = "numpy"
    kernels = KERNELS

    def decoded_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        return layout_of(constant, uses)

    def weight(self, constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Buffer:
        if layout.name == DECODED:
            return decoded(constant, layout, data)
        return super().weight(constant, layout, data)
