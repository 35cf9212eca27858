"""The backend object: native kernels, and NumPy's for everything else, in host memory."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml import backends
from pyggml.backends.base import Kernels
from pyggml.backends.cpu.doctor import require
from pyggml.backends.cpu.naming import names_of
from pyggml.backends.cpu.reasons import reason
from pyggml.backends.cpu.runner import CpuRunner
from pyggml.backends.cpu.table import KERNELS, CpuStep
from pyggml.backends.cpu.weights import tiles
from pyggml.backends.host import HostBackend
from pyggml.backends.host_tiles import LAYOUT
from pyggml.backends.step import Addresses, Buffer, Layouts, Step, WeightLayout
from pyggml.node import Node
from pyggml.transfer import transfer

# Importing a module registers its kernels.
FAMILIES = (
    "attention", "convert", "copy", "elementwise", "hyper_connections", "indexer",
    "linear.experts", "linear.kernels", "masks", "merge", "moe", "norm", "reduce", "rope", "sort",
    "strided", "top_k",
)  # fmt: skip
for _family in FAMILIES:
    importlib.import_module(f"pyggml.backends.cpu.{_family}")


class CpuBackend(HostBackend):
    """The host with native kernels. A node without one runs by NumPy's, in the same memory."""

    name = "cpu"
    kernels = KERNELS

    @cached_property
    def numpy(self) -> HostBackend:
        """The backend that runs the other nodes."""
        host = backends.get("numpy")
        assert isinstance(host, HostBackend)
        return host

    def supports(self, node: Node) -> str | None:
        return None if KERNELS.refusal(node) is None else self.numpy.supports(node)

    def lends_from(self, node: Node) -> int:
        """With 16 cores and an H100, DeepSeek-V2-Lite's experts take the cores 133 ms for 6 rows
        each and 243 ms for 12. The GPU takes 170 and 176 ms, nearly all of it to read the weights:
        10 ps an element of 4.5 bits. NumPy, which decodes a block in one thread, takes 3 to 100 ns.
        """
        if KERNELS.refusal(node) is None:
            return 8
        weights = [node[name] for name in node.op.weights]
        is_decoded = bool(weights) and all(weight.dtype.kind == "block" for weight in weights)
        return 1 if is_decoded else super().lends_from(node)

    def numeric(self, node: Node) -> str:
        host = self if KERNELS.refusal(node) is None else self.numpy
        return host.kernels.numeric(node)

    def weight_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        free = (use for use in uses if use.op.view is None and use.op is not transfer)
        runs = (KERNELS.refusal(use) is None for use in free)
        if all(runs) and tiles.read(constant, uses):
            return tiles.layout_of(constant)
        return super().weight_layout(constant, uses)

    def lower(
        self, nodes: Sequence[Node], keep: Collection[Node], layouts: Layouts, *, fuse: bool = True
    ) -> list[Step]:
        return [self._step(node, keep, layouts) for node in nodes]

    def _step(self, node: Node, keep: Collection[Node], layouts: Layouts) -> Step:
        if KERNELS.refusal(node) is None and tiles.ready(node, layouts):
            return KERNELS.step(node, CpuStep)
        [step] = self.numpy.lower([node], keep, layouts)
        return step

    def kernels_of(self, step: Step, at: Addresses, scratch: int) -> Kernels:
        return Kernels(tuple(names_of(step, at, scratch, self.numpy.kernels)), reason(step))

    def weight(self, constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Buffer:
        if layout.name == LAYOUT:
            require()
            return tiles.repacked(constant, layout, data)
        return super().weight(constant, layout, data)

    def bind(  # type: ignore[override]
        self,
        steps: Sequence[Step],
        at: Addresses,
        scratch: NDArray[np.uint8],
        scratch_at: Sequence[int],
    ) -> CpuRunner:
        require()
        return CpuRunner(self.numpy.kernels, steps, at, scratch, scratch_at)
