"""Random weights in place of a file's, so that a header is enough to run a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import lcm
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml.dtypes import DType
from pyggml.gguf.format import DEFAULT_ALIGNMENT, TensorInfo
from pyggml.gguf.synth import drawn_type, random_ids, random_tensor
from pyggml.models.synth import IDS, leaf_of, router_of, scale_of

#: Type, standard deviation and mean.
Kind: TypeAlias = tuple[DType, float, float]


class RandomWeights:
    """Random values for the tensors of a file, in its types and with the scales of `synth`.

    Tensors of a type and scale are parts of one array, which is drawn when the first of them is
    asked for. Each begins a little further in it than the one before in the file, so no two are
    equal, and the host has little more than the largest of each type and scale, however many layers
    there are. What reads them into its own memory, as a GPU does, has all of them there.
    DTypeError for a type of which nothing can be drawn.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._starts: dict[str, int] = {}
        self._sizes: dict[Kind, int] = {}
        count = Counter[Kind]()
        for name, info in tensors.items():
            if leaf_of(name) == IDS:
                continue
            kind = _kind(info)
            # Whole blocks, aligned as in a file.
            start = self._starts[name] = count[kind] * lcm(info.dtype.nbytes, DEFAULT_ALIGNMENT)
            self._sizes[kind] = max(self._sizes.get(kind, 0), start + info.nbytes)
            count[kind] += 1
        self._pools: dict[Kind, NDArray[np.uint8]] = {}
        self._lock = Lock()

    def array(self, name: str) -> NDArray[Any]:
        """The values of a tensor, as `GGUFFile.array` gives them."""
        info = self._tensors[name]
        if leaf_of(name) == IDS:
            ids = random_ids(name, info.ne, end=self._tensors[router_of(name)].ne[1])
            return np.concatenate([*ids.chunks()])
        start = self._starts[name]
        return info.array(self._pool(_kind(info))[start : start + info.nbytes])

    def _pool(self, kind: Kind) -> NDArray[np.uint8]:
        """The bytes of which tensors of a kind are parts."""
        with self._lock:
            if kind not in self._pools:
                self._pools[kind] = _drawn(kind, self._sizes[kind])
            return self._pools[kind]


def _kind(info: TensorInfo) -> Kind:
    return drawn_type(info.dtype.name), *scale_of(leaf_of(info.name), info.ne)


def _drawn(kind: Kind, nbytes: int) -> NDArray[np.uint8]:
    dtype, std, mean = kind
    n = nbytes // dtype.nbytes * dtype.block
    tensor = random_tensor("", dtype, (n,), std=std, mean=mean)
    pool, end = np.empty(nbytes, np.uint8), 0
    for chunk in tensor.chunks():
        flat = chunk.reshape(-1).view(np.uint8)
        pool[end : end + len(flat)] = flat
        end += len(flat)
    return pool
