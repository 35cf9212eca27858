"""What PYGGML_CUDA_DEBUG=1 adds to every step: its ids are looked at, and it is waited for."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from pyggml import ops
from pyggml.backends.base import Address, Step
from pyggml.backends.cuda.device.pinned import Staging, take
from pyggml.backends.cuda.fusion import seen
from pyggml.errors import IdError
from pyggml.node import Node

#: Of an op with ids: which source they are, which source they choose from, along which dimension.
IDS = {
    ops.get_rows: (1, 0, 1),
    ops.set_rows: (2, 0, 1),
    ops.add_id: (2, 1, 1),
    ops.mul_mat_id: (2, 0, 2),
    ops.moe_up_gate: (3, 0, 2),
}


def debugging() -> bool:
    """Whether steps run one by one, under watch."""
    return os.environ.get("PYGGML_CUDA_DEBUG") == "1"


def check_ids(staging: Staging, step: Step, at: Mapping[Node, Address]) -> None:
    """IdError where an id of the step is past the end. Kernels take such a one for none.

    Steps inside loops are not looked at.
    """
    found = IDS.get(step.node.op)
    if found is None:
        return
    ids, table = step.node.src[found[0]], step.node.src[found[1]]
    assert ids is not None and table is not None
    if seen(ids) in step.nodes:  # the step itself chooses them
        return
    largest = int(np.max(take(staging, at[ids], ids.spec)))
    count = table.ne[found[2]]
    if largest >= count:
        raise IdError(
            f"id {largest} is past the end: there are {count}, counted from 0; "
            "a negative id means none"
        )
