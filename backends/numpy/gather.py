"""Rows chosen by ids."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.host_memory import Raw
from pyggml.backends.numpy.arrays import Work, load
from pyggml.backends.numpy.tiling import shaped, split
from pyggml.dtypes import DType

#: Most bytes that NumPy allocates for a gather.
GATHERED = 24 * 1024
#: Most ids to compute with at once; their arrays are temporaries of NumPy too.
IDS = 512


def ids_in(index: Any, s: slice) -> Any:
    """Slice `s` of an array of ids, or of a range as an array; a number is returned as it is."""
    if isinstance(index, range):
        return np.arange(index[s].start, index[s].stop)
    return index[s] if isinstance(index, np.ndarray) else index


def gather(
    dtype: DType,
    raw: Raw,
    index: tuple[Any, ...],
    out: Raw,
    work: Work,
    spare: NDArray[np.uint8] | None = None,
) -> None:
    """out[i] = raw[index][i] in out's type; 0 where the last index is negative.

    The last index is a one-dimensional array of ids. Each other index is such an array too, a range
    or a number. If the other indices are numbers and choose a contiguous matrix, its rows are read
    straight into `out`, or through `spare` if they must be converted. Otherwise NumPy gathers into
    a new array: a few rows at a time, and long rows in parts.
    """
    *outer, ids = index
    if all(isinstance(i, int) for i in outer):
        table = raw[tuple(outer)]
        if table.flags.c_contiguous and _take(dtype, table, ids, out, work, spare):
            return
    row = raw[(0,) * len(index)]
    units = len(row)  # elements, or blocks
    unit_bytes = row.nbytes // units
    rows = max(1, min(IDS, GATHERED // row.nbytes))
    columns = units if row.nbytes <= GATHERED else GATHERED // unit_bytes
    for s in split(len(out), rows):
        indices = [ids_in(i, s) for i in index]
        missing = indices[-1] < 0
        indices[-1] = np.maximum(indices[-1], 0)
        for c in split(units, columns):
            target = out[s, c.start * dtype.block : c.stop * dtype.block]
            load(dtype, raw[(*indices, c)], target, work)
        out[s][missing] = 0


def _take(
    dtype: DType,
    table: Raw,
    ids: Raw,
    out: Raw,
    work: Work,
    spare: NDArray[np.uint8] | None,
) -> bool:
    """Write the chosen rows to `out` without memory that NumPy allocates; returns whether that was
    possible."""
    direct = dtype.numpy is not None and table.dtype == out.dtype and out.flags.c_contiguous
    rows = IDS
    if not direct:
        rows = 0 if spare is None else min(IDS, spare.nbytes // table[0].nbytes)
    for s in split(len(out), rows) if rows else ():
        target = out[s]
        if spare is not None and not direct:
            target = shaped(spare.view(table.dtype), len(target), *table.shape[1:])
        # Without mode="clip" NumPy writes into a copy of the result first.
        np.take(table, ids[s], axis=0, out=target, mode="clip")
        if not direct:
            load(dtype, target, out[s], work)
        out[s][ids[s] < 0] = 0
    return rows > 0
