"""Stand-ins for open files: of a layer with given weights, and of a model without weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from numpy.typing import ArrayLike

import pyggml as gg
from pyggml.gguf import GGUFFile
from pyggml.gguf.format import TensorInfo
from pyggml.models.base import Architecture
from pyggml.models.known import tensor_sizes
from pyggml.models.weights import Layer, Weights

#: Tensor -> ne; None: the file does not have it.
Changes = Mapping[str, tuple[int, ...] | None]


def layer_of(weights: Mapping[str, ArrayLike | gg.Node], il: int = 0) -> Layer:
    """A layer with these weights, by their names in a file without `blk.N.`."""
    nodes = {
        f"blk.{il}.{name}": w if isinstance(w, gg.Node) else gg.constant(w, name=name)
        for name, w in weights.items()
    }
    infos = {
        name: TensorInfo(name, node.dtype, node.shape[::-1], 0, 0) for name, node in nodes.items()
    }
    file: Any = SimpleNamespace(
        tensors=infos, array=lambda name: gg.ops.leaf.data_of(nodes[name]), source=nodes.get
    )
    return Weights(file, {}).layer(il)


def file_of(
    arch: Architecture,
    keys: Mapping[str, Any] | None = None,
    tensors: Changes | None = None,
) -> GGUFFile:
    """A file of the model without data; None in `keys` or `tensors` removes an entry.

    keys  of the architecture, without its prefix, or complete with a "general." or "tokenizer."
    """
    fields = arch.fields()
    for name, value in (keys or {}).items():
        own = not name.startswith(("general.", "tokenizer."))
        fields[f"{arch.name}.{name}" if own else name] = value
    sizes: dict[str, tuple[int, ...] | None] = {**tensor_sizes(arch), **(tensors or {})}
    file: Any = SimpleNamespace(
        fields={key: value for key, value in fields.items() if value is not None},
        tensors={
            name: TensorInfo(name, gg.dtypes.TYPES["f32"], ne, 0, 0)
            for name, ne in sizes.items()
            if ne is not None
        },
        source=lambda name: None,
    )
    return file  # type: ignore[no-any-return]
