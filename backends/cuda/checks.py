"""What PYGGML_CUDA_DEBUG=1 adds to every step: its ids are looked at, and it is waited for."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from pyggml.backends.base import Address, Step
from pyggml.backends.cuda.device.pinned import Staging, take
from pyggml.backends.cuda.fusion import seen
from pyggml.errors import IdError
from pyggml.node import Node


def debugging() -> bool:
    """Whether steps run one by one, under watch."""
    return os.environ.get("PYGGML_CUDA_DEBUG") == "1"


def check_ids(staging: Staging, step: Step, at: Mapping[Node, Address]) -> None:
    """IdError where an id of the step is past the end. Kernels take such a one for none.

    Steps inside loops are not looked at.
    """
    node, choice = step.node, step.node.op.ids
    if choice is None:
        return
    ids, count = node[choice.operand], node[choice.of].ne[choice.axis]
    if seen(ids) in step.nodes:  # the step itself chooses them
        return
    largest = int(np.max(take(staging, at[ids], ids.spec)))
    if largest >= count:
        raise IdError(
            f"id {largest} is past the end: there are {count}, counted from 0; "
            "a negative id means none"
        )
