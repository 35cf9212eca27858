"""A norm and a rotation fused into one step: queries of some models, and rows of caches."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run, behind_reshapes
from pyggml.backends.cuda.geometry import ROWS, threads_for
from pyggml.backends.cuda.launch import ABSENT, Call, Operand
from pyggml.backends.cuda.rope import constants
from pyggml.dtypes import F32, I32
from pyggml.node import Node

FILE = "norm_rope.cu"
#: The longest row: 32 KB of shared memory, which every GPU has without asking for more.
LONGEST = 8192


class Turned(NamedTuple):
    """rope_ext(rms_norm(a)) or, with a row `weight`, rope_ext(rms_norm(a) weight).

    nodes  those it covers, in order: the last one is the rotation
    """

    nodes: tuple[Node, ...]
    a: Node
    weight: Node | None

    @property
    def reads(self) -> dict[str, Node]:
        reads = {"a": self.a, "pos": self.nodes[-1]["pos"]}
        return reads if self.weight is None else {**reads, "weight": self.weight}


def turned(rotated: Node, run: Run) -> Turned | None:
    """The norm and the rotation that end in a node, if no other node reads what is in between."""
    if rotated.op is not ops.rope_ext or rotated.get("freq_factors") is not None:
        return None
    last = behind_reshapes(rotated["a"])
    scaled = last if last.op is ops.mul else None
    normed = last if scaled is None else scaled["a"]
    if normed.op is not ops.rms_norm or rotated.dtype is not F32:
        return None
    nodes = tuple(node for node in (normed, scaled, rotated) if node is not None)
    if not all(run.only(node, reader) for node, reader in pairwise(nodes)):
        return None
    a, weight, n = normed["a"], None if scaled is None else scaled["b"], rotated.ne[0]
    if weight is not None and (weight.dtype is not F32 or weight.ne != (n, 1, 1, 1)):
        return None
    rows = rotated.ne[3] == 1 and a.ne in (rotated.ne, (n, rotated.ne[2], 1, 1))
    one_head = a.ne == rotated.ne or rotated.ne[1] == 1
    return Turned(nodes, a, weight) if rows and one_head and n <= LONGEST else None


def norm_rope(node: Node, run: Run) -> Fused | None:
    """rope_ext(rms_norm(a)), or rope_ext(rms_norm(a) w) with a single row w."""
    match = turned(node, run)
    if match is None:
        return None
    return Fused(match.nodes, match.reads, partial(record, turned=match), inplace=(match.a,))


def norm_rope_into_rows(node: Node, run: Run) -> Fused | None:
    """set_rows(cache, reshape(rope_ext(rms_norm(a) w, pos)), ids): stores the heads of a token,
    normalized and rotated, as a row."""
    cache, row, ids = node["a"], node["b"], node["ids"]
    rotated = row["a"] if row.op is ops.reshape else row
    match = turned(rotated, run)
    if match is None or not run.only(rotated, node):
        return None
    n, heads, n_tokens, _ = rotated.ne
    fits = (
        row.ne == (n * heads, n_tokens, 1, 1)
        and cache.dtype.name in ROWS
        and n % cache.dtype.block == 0
        and ids.dtype is I32
        and cache.ne[2:] == (1, 1)
    )
    if not fits:
        return None
    reads = {"cache": cache, **match.reads, "ids": ids}
    return Fused((*match.nodes, node), reads, partial(record, turned=match))


def record(call: Call, turned: Turned) -> None:
    normed, rotated = turned.nodes[0], turned.nodes[-1]
    n, heads, n_tokens, _ = rotated.ne
    a, ids, neox = _of_heads(call["a"], rotated), call.get("ids"), rotated.attrs["mode"] == "neox"
    kinds = [str(neox).lower()] if ids is None else [ROWS[call.out.dtype.name], str(neox).lower()]
    tensors = [
        call.out,
        a,
        call.get("weight") or ABSENT,
        call["pos"],
        *([] if ids is None else [ids]),
    ]
    call.launch(
        FILE,
        f"norm_rope{'' if ids is None else '_rows'}<{', '.join(kinds)}>",
        grid=(heads, n_tokens),
        block=threads_for(n // 2, 256),
        args=[
            *(x.tensor for x in tensors),
            np.float32(normed.attrs["eps"]),
            constants(rotated.attrs),
        ],
        shared=4 * n,
    )


def _of_heads(a: Operand, rotated: Node) -> Operand:
    """The rows of a as those of heads and tokens."""
    if a.ne == rotated.ne:
        return a
    return replace(a, ne=rotated.ne, nb=(a.nb[0], a.nb[1], a.nb[1], a.nb[2]))
