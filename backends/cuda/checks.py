"""The checks of PYGGML_CUDA_DEBUG=1: ids are in range; each step is waited for (see runner.py)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.device.pinned import Staging, take
from pyggml.backends.step import Address, Step, check_id
from pyggml.node import Node
from pyggml.ops.attention import first_past


def debugging() -> bool:
    """Whether steps run one by one, with checks."""
    return os.environ.get("PYGGML_CUDA_DEBUG") == "1"


def check_ids(staging: Staging, step: Step, at: Mapping[Node, Address]) -> None:
    """Raise IdError if an id of the step is past the end; kernels treat such an id as negative.

    The same for positions past the keys of a causal mask. Steps inside loops are not checked.
    """
    for node in step.nodes:
        choice = node.op.ids
        if node.op is ops.causal_mask and node.get("kv_end") is None:
            _check(staging, step, node["pos"], at, first_past(node), "position", "the keys")
        elif choice is not None and node.get(choice.operand) is not None:
            count = node[choice.of].ne[choice.axis]
            _check(staging, step, node[choice.operand], at, count, "id", "the end")


def _check(
    staging: Staging,
    step: Step,
    ids: Node,
    at: Mapping[Node, Address],
    count: int,
    what: str,
    end: str,
) -> None:
    if ids.base in step.nodes:  # the step itself computes them
        return
    largest = int(np.max(take(staging, at[ids], ids.spec)))
    check_id(largest, count, what, end)
