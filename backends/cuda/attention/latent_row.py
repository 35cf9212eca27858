"""The cache row of latent attention: norm, rotation, concat and write fused into one step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from pyggml import ops
from pyggml.backends.cuda.argument import Struct, Tensor
from pyggml.backends.cuda.fusion import Fused, Run, behind_reshapes
from pyggml.backends.cuda.geometry import ROWS
from pyggml.backends.cuda.launch import ABSENT, Call, Operand
from pyggml.backends.cuda.rope import Rope, constants
from pyggml.dtypes import F32, I32
from pyggml.node import Attrs, Node

#: Tokens from which a block has two warps, so that all blocks are on a GPU at once.
MANY = 1024


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
        RecordRow(normed.attrs["eps"], rotated.attrs),
    )


class LatentRow(Struct):
    """The struct `LatentRow` of latent_row.cuh."""

    _fields_ = (
        *((name, Tensor) for name in ("cache", "c", "w", "k", "pos", "ids")),
        ("eps", ctypes.c_float),
        ("rope", Rope),
    )


NO_ROW = LatentRow(
    **dict.fromkeys(("cache", "c", "w", "k", "pos", "ids"), ABSENT.tensor),
    eps=0.0,
    rope=Rope(**dict.fromkeys((field[0] for field in Rope._fields_), 0)),
)


@dataclass(frozen=True)
class RecordRow:
    """Records the launch of the row."""

    eps: float
    rope: Attrs

    @property
    def neox(self) -> bool:
        return bool(self.rope["mode"] == "neox")

    def argument(self, cache: Operand, named: Callable[[str], Operand]) -> LatentRow:
        tensors = {name: named(name).tensor for name in ("c", "k", "pos", "ids")}
        return LatentRow(
            cache=cache.tensor,
            w=named("weight").tensor,
            eps=self.eps,
            rope=constants(self.rope),
            **tensors,
        )

    def __call__(self, call: Call) -> None:
        call.launch(
            "latent_row.cu",
            f"latent_row<{ROWS[call.out.dtype.name]}, {str(self.neox).lower()}>",
            grid=call["c"].ne[1],
            block=64 if call["c"].ne[1] >= MANY else 256,
            args=[self.argument(call.out, call.__getitem__)],
            shared=row_bytes(call["c"], call["k"]),
        )


def row_bytes(c: Operand, k: Operand) -> int:
    """Bytes of shared memory for a row."""
    return 4 * (c.ne[0] + k.ne[0])
