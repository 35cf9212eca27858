"""A row of a compressor for a few tokens, fused into one step (`compress` in
models/compressor.py)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import partial

from pyggml import ops
from pyggml.backends.cuda.argument import Struct, Tensor
from pyggml.backends.cuda.fusion import Fused, Run, behind_reshapes
from pyggml.backends.cuda.geometry import ROWS
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.norm_rope import turned
from pyggml.backends.cuda.rope import Rope, constants
from pyggml.dtypes import F32, I32
from pyggml.node import Attrs, Node

#: The most tokens that one block writes to the ring.
FEW = 8
#: The most threads of a block.
THREADS = 1024
#: More candidates than these are pooled by several blocks.
MANY = 32
_TENSORS = (
    "cache", "ring_v", "ring_z", "v", "z", "ape", "places", "tokens", "ids", "bias", "weight",
    "start", "row",
)  # fmt: skip


class Compressor(Struct):
    """The struct `Compressor` of compressor.cuh."""

    _fields_ = (
        *((name, Tensor) for name in _TENSORS),
        ("rope", Rope),
        ("pooled", ctypes.c_uint64),
        ("eps", ctypes.c_float),
    )


def compressed_row(node: Node, run: Run) -> Fused | None:
    """set_rows(cache, rope(rms_norm(x) w), row) of one window's x, the sum over candidates

        x = sum_rows(mul(columns(v), soft_max(columns(add(z, bias)))))

    where v and z are get_rows of rings to which `set_rows` has just written, z's with ape added.
    """
    rotated = behind_reshapes(node["b"])
    match = turned(rotated, run)
    if match is None or match.weight is None or not run.only(rotated, node):
        return None
    pooled = _pooled(behind_reshapes(match.a), match.nodes[0], run)
    if pooled is None:
        return None
    nodes, reads, results = pooled
    reads = {
        **reads, "cache": node["a"], "weight": match.weight,
        "start": rotated["pos"], "row": node["ids"],
    }  # fmt: skip
    if not _fits(reads, node):
        return None
    eps, rope = match.nodes[0].attrs["eps"], rotated.attrs
    scratch = 4 * node["a"].ne[0] if reads["ids"].ne[0] > MANY else 0
    return Fused(
        (*nodes, *match.nodes, node),
        reads,
        partial(record, eps=eps, rope=rope),
        results=results,
        scratch=scratch,
    )


_Nodes = tuple[Node, ...]


def _pooled(
    total: Node, reader: Node, run: Run
) -> tuple[_Nodes, dict[str, Node], dict[str, Node]] | None:
    """The nodes of x that ends in `total`, those it reads and the handles of the rings."""
    product = total["a"] if total.op is ops.sum_rows else total
    if product.op is not ops.mul or total is product or product["b"].op is not ops.soft_max_ext:
        return None
    gates = product["b"]
    plain = gates.attrs["scale"] == 1 and gates.get("mask") is None and gates.get("sinks") is None
    columns = product["a"], gates["a"]
    biased = _candidates(columns[1])
    if not plain or biased is None or biased.op is not ops.add:
        return None
    of_v, of_z, bias = _candidates(columns[0]), biased["a"], biased["b"]
    if of_v is None or of_v.op is not ops.get_rows or of_z.op is not ops.get_rows:
        return None
    writes = behind_reshapes(of_v["a"]), behind_reshapes(of_z["a"])
    if any(w.op is not ops.set_rows for w in writes) or of_v["ids"] is not of_z["ids"]:
        return None
    of_ape = writes[1]["b"]
    if of_ape.op is not ops.add or of_ape["b"].op is not ops.get_rows:
        return None
    ape = of_ape["b"]
    inner = (
        (ape, of_ape), (of_ape, writes[1]), (of_v, columns[0]), (of_z, biased),
        (biased, columns[1]), (columns[1], gates), (columns[0], product), (gates, product),
        (product, total), (total, reader),
    )  # fmt: skip
    if writes[0]["ids"] is not writes[1]["ids"] or not all(run.only(*pair) for pair in inner):
        return None
    nodes = (
        ape, of_ape, *writes, of_v, of_z, biased, *columns, gates, product, total,
    )  # fmt: skip
    reads = {
        "v": writes[0]["b"], "z": of_ape["a"], "ape": ape["a"], "places": ape["ids"],
        "tokens": writes[0]["ids"], "ids": of_v["ids"], "bias": bias,
        "old_v": writes[0]["a"], "old_z": writes[1]["a"],
    }  # fmt: skip
    return nodes, reads, {"ring_v": writes[0], "ring_z": writes[1]}


def _candidates(columns: Node) -> Node | None:
    """What `columns` is a copy of, turned: cont(permute(reshape(a, [d, n, 1]), 1, 0, 2))."""
    if columns.op is not ops.cont or columns["a"].op is not ops.permute:
        return None
    turned, a = columns["a"], behind_reshapes(columns["a"]["a"])
    n, d, windows, _ = turned.ne
    whole = turned["a"].ne == (d, n, windows, 1) and a.ne == (d, n, 1, 1)
    return a if whole and windows == 1 else None


def _fits(reads: Mapping[str, Node], node: Node) -> bool:
    """Whether the kernel knows these sizes and types."""
    cache, v, ring = reads["cache"], reads["v"], reads["old_v"]
    d, w, n = cache.ne[0], v.ne[0], reads["ids"].ne[0]
    floats = ("v", "z", "ape", "bias", "old_v", "old_z", "weight")
    whole = ("places", "tokens", "ids", "start", "row")
    return (
        all(reads[name].dtype is F32 for name in floats)
        and all(reads[name].dtype is I32 for name in whole)
        and cache.dtype.name in ROWS
        and node["b"].ne == (d, 1, 1, 1)
        and cache.ne[2:] == (1, 1)
        and d % 32 == 0 == w % d
        and d <= THREADS
        and v.ne == reads["z"].ne == (w, v.ne[1], 1, 1)
        and v.ne[1] <= FEW
        and all(reads[name].contiguous for name in ("old_v", "old_z"))
        and ring.spec.nbytes < 2**31
        and ring.ne == reads["old_z"].ne == (w, ring.ne[1], 1, 1)
        and reads["ape"].ne == (w, reads["ape"].ne[1], 1, 1)
        and reads["bias"].ne == (1, n, 1, 1)
        and reads["weight"].ne == (d, 1, 1, 1)
    )


def record(call: Call, eps: float, rope: Attrs) -> None:
    tensors = {name: call[name].tensor for name in _TENSORS if name != "cache"}
    d, n = call.out.ne[0], call["ids"].ne[0]
    blocks = next(b for b in (8, 4, 2, 1) if (n > MANY and d % (32 * b) == 0) or b == 1)
    columns = d // blocks
    threads = columns * max(1, min(THREADS // columns, n))
    constant = {"rope": constants(rope), "eps": eps}
    pooled = call.scratch(4 * d) if blocks > 1 else 0
    neox = str(rope["mode"] == "neox").lower()
    call.launch(
        "compressor.cu",
        f"compressed_row<{ROWS[call.out.dtype.name]}, {neox}>",
        grid=blocks,
        block=threads,
        args=[Compressor(cache=call.out.tensor, **tensors, pooled=pooled, **constant)],
        shared=12 * threads,
    )
