"""The row that latent attention caches: norm, rotation, their concat and its write as one step."""

from __future__ import annotations

from functools import partial

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run, fuses
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.rope import constants
from pyggml.dtypes import F32, I32
from pyggml.node import Node

#: Cache types, as values.cuh names what reads and writes them.
ROWS = {"f16": "Plain<__half>", "bf16": "Plain<__nv_bfloat16>", "q8_0": "q8_0"}


def _looked(node: Node | None) -> list[Node]:
    """A node behind reshapes, and these: the last is it."""
    found = []
    while node is not None and node.op is ops.reshape:
        found.append(node)
        node = node.src[0]
    return [*found, node] if node is not None else found


@fuses(ops.set_rows)
def latent_row(node: Node, run: Run) -> Fused | None:
    """set_rows(cache, concat(rms_norm(c) * w, rope(k)), ids), one row a token."""
    cache, row, ids = node.src
    assert cache is not None and row is not None and ids is not None
    if row.op is not ops.concat or row.attrs["dim"] != 0 or not run.only(row, node):
        return None
    scaled, turned = row.src[0], _looked(row.src[1])[-1]
    if scaled is None or scaled.op is not ops.mul or turned.op is not ops.rope_ext:
        return None
    normed, weight = scaled.src
    if normed is None or weight is None or normed.op is not ops.rms_norm:
        return None
    covered = (normed, scaled, turned, row)
    followers = (scaled, row, row, node)
    if not all(run.only(n, reader) for n, reader in zip(covered, followers)):
        return None
    c, k, pos = normed.src[0], turned.src[0], turned.src[1]
    assert c is not None and k is not None and pos is not None
    n_tokens = row.ne[1]
    fits = (
        cache.dtype.name in ROWS
        and row.ne[0] % cache.dtype.block == 0
        and row.dtype is turned.dtype is scaled.dtype is F32
        and ids.dtype is I32
        and row.ne[2] == row.ne[3] == 1
        and k.ne[1:] == (1, n_tokens, 1)
        and weight.dtype is F32
        and weight.ne == (c.ne[0], 1, 1, 1)
        and turned.src[2] is None
    )
    if not fits:
        return None
    record = partial(_record, eps=normed.attrs["eps"], turn=turned)
    return Fused((*covered, node), (cache, c, weight, k, pos, ids), record)


def _record(call: Call, eps: float, turn: Node) -> None:
    cache, c, weight, k, pos, ids = (call.operand(i) for i in range(6))
    neox = str(turn.attrs["mode"] == "neox").lower()
    call.launch(
        "latent_row.cu",
        f"latent_row<{ROWS[cache.dtype.name]}, {neox}>",
        grid=c.ne[1],
        block=256,
        args=[
            *(x.tensor for x in (call.out, c, weight, k, pos, ids)),
            np.float32(eps),
            constants(turn.attrs),
        ],
        shared=4 * (c.ne[0] + k.ne[0]),
    )
