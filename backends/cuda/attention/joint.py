"""Attention of a few tokens to one or two sets of rows, merged and rotated back, as one step.

    rope_ext(view(merge_lse(flash_attn_ext(q, a, ..), flash_attn_ext(q, b, ..))))

as in a decode step of DeepSeek V4, where a is a window, and b compressed rows or a list of them.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import NamedTuple

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.attention.arguments import Attention
from pyggml.backends.cuda.attention.flash import Recording
from pyggml.backends.cuda.attention.routes import C_TYPES, FULL, Shape, room_of
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import blocks_for
from pyggml.backends.cuda.launch import ABSENT, Call
from pyggml.backends.cuda.linear.common import aligned
from pyggml.backends.cuda.rope import constants
from pyggml.node import Attrs, Node
from pyggml.ops.leaf import state_op

FILE = "attention_joint.cu"
#: Elements of a row; the most tokens, and keys of a set. Beyond these, blocks of 64 heads pay.
D, FEW, KEYS = 512, 4, 16384
#: Rows of scores of a block, and keys of a tile.
ROWS, TILE = 16, 64


class Joint(Struct):
    """The struct `Joint` of attention_joint.cu."""

    _fields_ = (("sets", Attention * 2),)


class Parts(Struct):
    """The struct `Parts` of attention_joint.cu."""

    _fields_ = (
        ("sums", ctypes.c_uint64 * 2),
        ("stats", ctypes.c_uint64 * 2),
        ("splits", ctypes.c_int32 * 2),
    )


class Keys(NamedTuple):
    """An attention to one set of keys.

    reads  its operands; pos instead of a causal mask, which the kernel computes
    mask   that mask, if nothing else reads it
    """

    node: Node
    reads: dict[str, Node]
    mask: Node | None

    @property
    def splits(self) -> int:
        """How many blocks share the keys of a row, as in routes.py."""
        shape = Shape.of(self.node)
        units = blocks_for(shape.keys, TILE)
        most = max(1, min(FULL // (shape.n_q * blocks_for(shape.heads, ROWS)), units))
        return blocks_for(units, blocks_for(units, most))

    @property
    def parts(self) -> tuple[int, int]:
        """Bytes of the sums of all splits, and of their maxima and weights."""
        _, heads, n_tokens, _ = self.node.ne
        count = heads * n_tokens * self.splits
        return 4 * D * count, 8 * count


def joint_attention(node: Node, run: Run) -> Fused | None:
    """rope_ext of one attention, or of two that are merged."""
    attrs, a = node.attrs, node["a"]
    turns = attrs["mode"] == "normal" and not attrs["offset"] % 4 and not attrs["n_dims"] % 4
    if not turns or node.get("freq_factors") is not None:
        return None
    merged = a.base if a.base.op is ops.merge_lse else None
    if merged is not None and not _is_start(a, merged):
        return None
    whole = a if merged is None else merged
    attentions = (whole,) if merged is None else (merged["a"], merged["b"])
    readers = (node,) if merged is None else (merged, node)
    covered = attentions if merged is None else (*attentions, merged)
    if not all(run.only(n, *readers) for n in covered):
        return None
    keys = [_keys(n, merged is not None, run, node) for n in attentions]
    sets = tuple(sorted((x for x in keys if x is not None), key=lambda x: "ids" in x.reads))
    if len(sets) != len(attentions) or "ids" in sets[0].reads:
        return None
    first, last = sets[0].node, sets[-1].node
    if last["q"] is not first["q"] or last["k"].dtype is not first["k"].dtype:
        return None
    if sum("sinks" in x.reads for x in sets) > 1:
        return None
    masks = tuple(dict.fromkeys(x.mask for x in sets if x.mask is not None))
    reads = {f"{name}{i}": n for i, x in enumerate(sets) for name, n in x.reads.items()}
    return Fused(
        (*masks, *covered, node),
        {**reads, "q": first["q"], "turn": node["pos"]},
        partial(_record, sets=sets, rope=attrs),
        scratch=sum(aligned(n) for x in sets for n in x.parts),
        fixed=True,
        recompute=masks,
    )


def _is_start(view: Node, merged: Node) -> bool:
    """Whether the view is all rows of the merged attention, without their log-sum-exps."""
    direct = view.op.view is not None and view.src[0] is merged
    steps = all(n == 1 or x == y for n, x, y in zip(view.ne, view.nb, merged.nb))
    return direct and steps and view.offset == 0 and view.ne == (D, *merged.ne[1:])


def _keys(node: Node, lse: bool, run: Run, at: Node) -> Keys | None:
    """The keys of an attention whose step is at another node, if `joint` can walk them."""
    if node.op is not ops.flash_attn_ext or node not in run.number or node.attrs["lse"] != lse:
        return None
    q, k, mask, ids, attrs = node["q"], node["k"], node.get("mask"), node.get("ids"), node.attrs
    plain = attrs["prec"] == "default" and attrs["logit_softcap"] == 0 == attrs["max_bias"]
    n_tokens, heads = q.ne[1:3]
    fits = (
        plain
        and node.get("kv_len") is None
        and node["v"] is k
        and k.dtype.name in C_TYPES
        and k.ne == (D, k.ne[1], 1, 1)
        and q.ne == (D, n_tokens, heads, 1)
        and n_tokens <= FEW
        and (n_tokens == 1 or heads % ROWS == 0)
        and (k.ne[1] if ids is None else ids.ne[0]) <= KEYS
        and _is_aligned(k)
        and (mask is None or (mask.ne[2:] == (1, 1) and mask.nb[0] == 2))
    )
    if not fits:
        return None
    reads = {name: n for name in ("k", "mask", "ids", "sinks") if (n := node.get(name)) is not None}
    if mask is None or mask.op is not ops.causal_mask or mask.get("kv_end") is not None:
        return Keys(node, reads, None)
    if mask not in run.number or run.changed(mask, run.number[at]):
        return Keys(node, reads, None)
    del reads["mask"]
    attentions = (r for r in run.readers[mask] if r.op is ops.flash_attn_ext)
    alone = run.only(mask, *(r for r in attentions if r.get("mask") is mask))
    return Keys(node, {**reads, "pos": mask["pos"]}, mask if alone else None)


def _is_aligned(k: Node) -> bool:
    """Whether rows are at multiples of 16 bytes, or of 4 for q8_0, wherever their state is."""
    offset, node = 0, k
    while node.op is not state_op:
        if node.op.view is None and node.op.writes is None:
            return False
        offset += node.offset if node.op.view is not None else 0
        node = node.src[node.op.writes or 0] or node
    grain = 4 if k.dtype.name == "q8_0" else 16
    return k.contiguous and offset % grain == 0


def _record(call: Call, sets: tuple[Keys, ...], rope: Attrs) -> None:
    n_tokens, heads = sets[0].node["q"].ne[1:3]
    parts = [tuple(call.scratch(n) for n in x.parts) for x in sets]
    arguments = [_argument(call, x, i, *at) for i, (x, at) in enumerate(zip(sets, parts))]
    splits = [x.splits for x in sets]
    shape = Shape.of(sets[-1].node)
    instance = shape.latent(ROWS, room_of("latent", call.device))
    words = instance.name.removeprefix("latent<")
    if len(sets) == 1:
        parts, splits = [*parts, (0, 0)], [*splits, 0]
        arguments *= 2
    call.launch(
        FILE,
        f"joint<{words.rpartition(', ')[0]}>",  # without whether there is a list
        grid=(sum(splits), n_tokens * blocks_for(heads, ROWS)),
        block=instance.threads,
        args=[Joint(sets=tuple(arguments))],
        shared=instance.shared,
    )
    sinks = next((s for i in range(2) if (s := call.get(f"sinks{i}"))), ABSENT)
    fixed = call.get("fixed")
    sums, stats = zip(*parts)
    call.launch(
        FILE,
        f"joint_end<{str(fixed is not None).lower()}>",
        grid=(heads, n_tokens),
        block=D // 4,
        args=[
            *(x.tensor for x in (call.out, sinks, call["turn"])),
            Parts(sums=sums, stats=stats, splits=tuple(splits)),
            constants(rope),
            np.uint64(0 if fixed is None else fixed.ptr),
        ],
    )


def _argument(call: Call, keys: Keys, number: int, sums: int, stats: int) -> Attention:
    """The argument of one set, as if it were alone, but with all sums as parts."""
    named = {name: call[f"{name}{number}"] for name in keys.reads if name != "sinks"}
    operands = {"q": call["q"], "v": named["k"], **named}
    part = Call(keys.node, ABSENT, operands, keys.node.attrs, call.device)
    part.names_only = call.names_only
    mask = keys.node.get("mask")
    causal = mask.attrs if mask is not None and "pos" in named else None
    window, stride = (causal["window"], causal["stride"]) if causal else (None, 1)
    argument = Recording(part, window, stride).argument()
    argument.out, argument.parts, argument.stats, argument.map = 0, sums, stats, 0
    argument.splits = keys.splits
    argument.n_ids = Shape.of(keys.node).keys  # without a list, all of them
    argument.pitch = blocks_for(argument.heads, ROWS) * ROWS
    return argument
