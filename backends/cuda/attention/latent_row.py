"""The cache row of latent attention: norm, rotation, concat and write fused into one step."""

from __future__ import annotations

from functools import partial

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run, behind_reshapes
from pyggml.backends.cuda.geometry import ROWS
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.rope import constants
from pyggml.dtypes import F32, I32
from pyggml.node import Attrs, Node


def latent_row(node: Node, run: Run) -> Fused | None:
    """set_rows(cache, concat(rms_norm(c) * w, rope(k)), ids), with one row per token."""
    cache, row, ids = node["a"], node["b"], node["ids"]
    if row.op is not ops.concat or row.attrs["dim"] != 0 or not run.only(row, node):
        return None
    scaled, rotated = row["a"], behind_reshapes(row["b"])
    if scaled.op is not ops.mul or rotated.op is not ops.rope_ext:
        return None
    normed, weight = scaled["a"], scaled["b"]
    if normed.op is not ops.rms_norm:
        return None
    covered = (normed, scaled, rotated, row)
    followers = (scaled, row, row, node)
    if not all(run.only(n, reader) for n, reader in zip(covered, followers)):
        return None
    c, k = normed["a"], rotated["a"]
    n_tokens = row.ne[1]
    fits = (
        cache.dtype.name in ROWS
        and row.ne[0] % cache.dtype.block == 0
        and row.dtype is rotated.dtype is scaled.dtype is F32
        and ids.dtype is I32
        and row.ne[2] == row.ne[3] == 1
        and k.ne[1:] == (1, n_tokens, 1)
        and weight.dtype is F32
        and weight.ne == (c.ne[0], 1, 1, 1)
        and rotated.get("freq_factors") is None
    )
    if not fits:
        return None
    return Fused(
        (*covered, node),
        {"cache": cache, "c": c, "weight": weight, "k": k, "pos": rotated["pos"], "ids": ids},
        partial(_record, eps=normed.attrs["eps"], rope=rotated.attrs),
    )


def _record(call: Call, eps: float, rope: Attrs) -> None:
    c, k = call["c"], call["k"]
    neox = str(rope["mode"] == "neox").lower()
    call.launch(
        "latent_row.cu",
        f"latent_row<{ROWS[call.out.dtype.name]}, {neox}>",
        grid=c.ne[1],
        block=256,
        args=[
            *(x.tensor for x in (call.out, c, call["weight"], k, call["pos"], call["ids"])),
            np.float32(eps),
            constants(rope),
        ],
        shared=4 * (c.ne[0] + k.ne[0]),
    )
