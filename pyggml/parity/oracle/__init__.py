"""Every op once more in float64: the plainest statement of its contract, as a judge of backends.

Nothing here is shared with `ops`, `backends` or `quants`; an error there cannot hide here. Arrays
are 4-D in NumPy shape (the reverse of `ne`), float64 or int64, block types already decoded; an
absent optional source is None. Results are float64 or int64, and are not rounded to the type of
the node, except by `cast`.

The tables `CASES` and `LARGE` of each family have the cases of its ops; `pyggml.parity.cases`
explains them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import getmembers, isfunction
from typing import Any

import numpy as np

from pyggml.parity.oracle import (
    attention,
    collective,
    copy,
    elementwise,
    hyper_connections,
    indexer,
    linear,
    moe,
    reduce,
    rope,
)
from pyggml.parity.oracle.base import Array

FAMILIES = (
    copy, elementwise, reduce, rope, linear, attention, indexer, moe, hyper_connections, collective,
)  # fmt: skip

#: Op name -> function(*sources, **attributes): the public functions of the family files.
ORACLE: dict[str, Callable[..., Array]] = {
    name: function
    for family in FAMILIES
    for name, function in getmembers(family, isfunction)
    if function.__module__ == family.__name__ and not name.startswith("_")
}


def run(op: str, sources: Sequence[Array | None], /, **attrs: Any) -> Array:
    """The result of `op` in float64 (int64 for integer results), 4-D in NumPy shape."""
    with np.errstate(all="ignore"):  # NaN and infinity among the values are meant
        return ORACLE[op](*sources, **attrs)
