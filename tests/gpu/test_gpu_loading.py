"""Weights packed on a GPU are byte for byte those of the NumPy packer."""

from __future__ import annotations

import mmap
import tempfile
from typing import Any

import numpy as np
import pytest

from pyggml import backends
from pyggml.backends.cuda.weights import loading, packing
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.dtypes import TYPES
from pyggml.spec import Ne


def check(name: str, ne: Ne, rows: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    t, gpu = TYPES[name], backends.get("cuda")
    expected = packing.to_tiles(t, ne, rows.reshape(-1, ne[0] // t.block, t.nbytes))
    out = np.full_like(expected, 0xAA)
    with gpu.context:
        buffer = gpu.alloc(len(out))
        loading.upload_packed(gpu.context, gpu.staging, buffer.ptr, t, ne, rows)
        gpu.staging.download(out, buffer.ptr)
    np.testing.assert_array_equal(out, expected, err_msg=f"{name} {ne}")


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_packs_like_numpy(name: str) -> None:
    t = TYPES[name]
    for blocks, rows, matrices in ((1, 1, 1), (3, 7, 4), (7, 19, 2), (33, 1003, 5)):
        ne = (blocks * t.block, rows, matrices, 1)
        nbytes = t.row_bytes(ne[0]) * rows * matrices
        check(name, ne, np.random.default_rng(rows).integers(0, 256, nbytes, np.uint8))


@pytest.mark.parametrize("name", ("q4_0", "q4_K", "mxfp4"))
def test_a_large_weight_from_a_file(name: str) -> None:
    """Many times the pinned memory, read by threads from a map of a file."""
    ne = (2048, 1408, 48, 1)
    nbytes = TYPES[name].row_bytes(ne[0]) * ne[1] * ne[2]
    with tempfile.TemporaryFile() as file:
        file.write(np.random.default_rng(5).integers(0, 256, nbytes, np.uint8).tobytes())
        file.flush()
        check(name, ne, np.frombuffer(mmap.mmap(file.fileno(), nbytes), np.uint8))
