"""A file's tensors as constants of graphs, by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from numpy.typing import NDArray

from pyggml.gguf import GGUFFile
from pyggml.node import Node
from pyggml.node import label as add_label
from pyggml.ops.leaf import deferred


class Weights:
    """The tensors of an open file as constants; each is created when it is first asked for.

    Names have no `.weight`: w["output"] is output.weight, w["output.scale"] is output.scale. No
    bytes are read until a plan is bound. Keep one object for all graphs of a store: they share
    its constants.

    sizes  full name -> ne, where a file may store the same rows in another shape
    """

    def __init__(self, file: GGUFFile, sizes: Mapping[str, tuple[int, ...]]) -> None:
        self._file, self._sizes = file, sizes
        self._nodes: dict[str, Node] = {}
        self._layers: dict[int, Layer] = {}

    def full_name(self, name: str) -> str:
        """The tensor's name in the file; "" if it has none such."""
        return next((n for n in (f"{name}.weight", name) if n in self._file.tensors), "")

    def __contains__(self, name: str) -> bool:
        return bool(self.full_name(name))

    def __getitem__(self, name: str) -> Node:
        """UnknownNameError, with the nearest names, for a tensor the file does not have."""
        if name not in self._nodes:
            full = self.full_name(name) or f"{name}.weight"
            info = self._file.tensors[full]
            ne = self._sizes.get(full, info.ne)
            load = partial(self._load, full, ne)
            self._nodes[name] = deferred(
                load, dtype=info.dtype, ne=ne, name=full, source=self._file.source(full)
            )
        return self._nodes[name]

    def _load(self, full: str, ne: tuple[int, ...]) -> NDArray[Any]:
        array = self._file.array(full)
        return array.reshape(*ne[:0:-1], array.shape[-1])

    def get(self, name: str) -> Node | None:
        if name not in self:
            return None
        return self[name]

    def label(self, node: Node, name: str) -> Node:
        """`node` with llama.cpp's label."""
        return add_label(node, name)

    def layer(self, il: int) -> Layer:
        return self._layers.setdefault(il, Layer(self, il))


class Layer:
    """The tensors of layer `il`: layer["attn_q"] is blk.IL.attn_q.weight."""

    def __init__(self, weights: Weights, il: int) -> None:
        self.weights, self.il = weights, il

    def __contains__(self, name: str) -> bool:
        return f"blk.{self.il}.{name}" in self.weights

    def __getitem__(self, name: str) -> Node:
        return self.weights[f"blk.{self.il}.{name}"]

    def get(self, name: str) -> Node | None:
        if name not in self:
            return None
        return self[name]

    def label(self, node: Node, name: str) -> Node:
        """`node` with llama.cpp's label for this layer, such as kq-3."""
        return add_label(node, f"{name}-{self.il}")
