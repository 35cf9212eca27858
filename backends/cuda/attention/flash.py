"""flash_attn_ext: its eight kernels, and the launches before and after them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.attention.arguments import Attention, HopperArgument, LatentArgument
from pyggml.backends.cuda.attention.routes import (
    CELL,
    HOPPER,
    LATENT,
    TYPES,
    Instance,
    Shape,
    room_of,
)
from pyggml.backends.cuda.device.tensormap import TensorMap, tensor_map
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.launch import ABSENT, Call, Operand, early_reads
from pyggml.backends.cuda.linear.common import dense
from pyggml.backends.cuda.linear.halves import launch_halves, rows_and_scales
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import F32
from pyggml.node import Node
from pyggml.spec import Ne

#: Of `Early` in overlap.cuh.
SPANS = 3
#: Blocks of a head of keys that run at the same time in `hopper`, at least, if it has as many.
TOGETHER = 8


def _refuses(node: Node) -> str | None:
    k, v, mask = node["k"], node["v"], node.get("mask")
    if node.get("ids") is not None:
        if (k.ne[0], v.ne[0]) not in LATENT:
            known = " and ".join(f"{d_k}/{d_v}" for d_k, d_v in LATENT)
            return f"flash_attn_ext takes ids only with head sizes {known}"
        if mask is not None and mask.ne[2] > 1:
            return "flash_attn_ext takes ids only with one mask for all heads"
    for what, source in (("keys", k), ("values", v)):
        if source.dtype.name not in TYPES:
            return f"flash_attn_ext cannot read {what} of {source.dtype}"
    if max(k.ne[0], v.ne[0]) > 576:
        return f"flash_attn_ext takes head sizes up to 576, got {k.ne[0]} and {v.ne[0]}"
    return None


def _numeric(node: Node) -> str:
    shape = Shape.of(node)
    if shape.routes[0] == "any":
        return "f32"
    return "bf16" if shape.type_k == "bf16" else "f16"


@kernel(
    ops.flash_attn_ext,
    types=None,
    scratch=lambda node: Shape.of(node).scratch(),
    refuses=_refuses,
    numeric=_numeric,
)
def flash_attn_ext(call: Call) -> None:
    Recording(call).record()


def flash_attn_causal(call: Call, window: int | None, stride: int = 1) -> None:
    """flash_attn_ext for a node whose mask is causal_mask(pos, window, stride), without reading the
    mask.

    It reads call["pos"] instead, and needs less scratch than flash_attn_ext.
    """
    Recording(call, window, stride).record()


def causal_attention(node: Node, run: Run) -> Fused | None:
    """flash_attn_ext with a causal mask. Attentions that share a mask each compute it from
    positions. One over lists does so even if others need the mask, for instance the indexer that
    made the lists: a mask that it gathers costs a read per key."""
    mask = node.get("mask")
    if mask is None or mask.op is not ops.causal_mask or mask not in run.number:
        return None
    if mask.get("kv_end") is not None:
        return None  # the kernels know the positions of key j from j
    attentions = (r for r in run.readers[mask] if r.op is ops.flash_attn_ext)
    alone = run.only(mask, *(r for r in attentions if r.get("mask") is mask))
    if not alone and (node.get("ids") is None or run.changed(mask, run.number[node])):
        return None
    others = {name: s for name in node.op.operands if (s := node.get(name)) and name != "mask"}
    return Fused(
        (mask, node) if alone else (node,),
        {"pos": mask["pos"], **others},
        partial(flash_attn_causal, window=mask.attrs["window"], stride=mask.attrs["stride"]),
        scratch=Shape.of(node, fused=True).scratch(),
        recompute=(mask,) if alone else (),
        halves=2 * _can_leave_halves(node),
    )


def _can_leave_halves(node: Node) -> bool:
    """Whether results can be rows of f16 that a product reads: f16 holds what lies between values
    of f16."""
    shape = Shape.of(node, fused=True)
    return shape.routes[0] == "hopper" and shape.type_v != "bf16" and not node.attrs["lse"]


class Recording:
    """One node being recorded. Instead of a mask it may read call["pos"], with a window or None,
    and a stride."""

    def __init__(self, call: Call, window: int | None = None, stride: int = 1) -> None:
        self.call, self.window, self.stride = call, window, stride
        self.q, self.k, self.v = call["q"], call["k"], call["v"]
        self.mask, self.pos = call.get("mask"), call.get("pos")
        self.shape = Shape.of(call.node, fused=self.mask is None)
        self.v_start = self.parts = self.stats = self.map = 0
        self.route = next(r for r in self.shape.routes if self._fits(r))
        self.instance = self._instance(self.route)

    def _instance(self, route: str) -> Instance:
        return self.shape.instance(route, room_of(route, self.call.device), self._extra)

    @property
    def _extra(self) -> bool:
        """Whether there is a mask or a soft-cap."""
        return self.mask is not None or self.call.attrs["logit_softcap"] > 0

    def _fits(self, route: str) -> bool:
        """Whether a kernel supports these addresses, these strides and this device."""
        if route == "any":
            return True
        grain = 4 if self.shape.type_k == "q8_0" else 16
        if not (self.k.aligned(grain) and self.v.aligned(grain)):
            return False
        if self.shape.mask_batch and self.mask is not None and self.mask.nb[0] != 2:
            return False
        if "latent" in route or "list" in route:
            if not self.q.aligned(8):
                return False
            start = self._inside()
            if start is None or start % (8 if route == "latent" else 64):
                return False
            self.v_start = start
        if ("hopper" in route or route == "list_token") and self.call.device.arch != "90a":
            return False
        if route == "list_token" and (self.call.attrs["logit_softcap"] or self._slopes):
            return False
        instance = self._instance(route)
        few = self.shape.blocks(instance.rows) <= 65535
        return few and instance.shared <= room_of(route, self.call.device)

    @property
    def _slopes(self) -> bool:
        return self.mask is not None and self.call.attrs["max_bias"] > 0

    def _inside(self) -> int | None:
        """The element of a row of keys at which its values start, or None if they are not part of
        it."""
        k, v = self.k, self.v
        if any(a != b for n, a, b in zip(k.ne[1:], k.nb[1:], v.nb[1:]) if n > 1):
            return None
        start, remainder = divmod(v.ptr - k.ptr, k.dtype.nbytes)
        start *= k.dtype.block
        return start if remainder == 0 <= start <= k.ne[0] - v.ne[0] else None

    def record(self) -> None:
        call, shape, argument = self.call, self.shape, self.record_parts()
        rows = shape.n3 * shape.n_q * shape.heads
        if self.route == "list_token":
            self._launch(self.route, "list_combine", (rows, 1, 1), argument)
        elif shape.splits(self.route) > 1:
            lanes = 4 if shape.d_v % 4 == 0 else 1
            grid = rows, -(-shape.d_v // (32 * lanes)), 1
            self._launch("combine", f"combine<{lanes}>", grid, argument)
        if (halves := call.get("halves")) is not None and not self._own_halves:
            launch_halves(call, dense(call.out.ptr, self._merged, F32), halves.ptr, "__half")

    def record_parts(self) -> Attention:
        """Record all but the sum of the splits, if there are several. Returns what that reads."""
        call, shape, route, instance = self.call, self.shape, self.route, self.instance
        sizes = zip((self.k, self.v), shape.decoded(route))
        self.k, self.v = (self._decoded(x, n) if n else x for x, n in sizes)
        if shape.splits(route) > 1 or route == "list_token":
            self.parts, self.stats = (call.scratch(n) for n in shape.parts(route))
        if shape.mask_batch:
            self.map = call.scratch(shape.map)
        argument = self.argument()
        if shape.mask_batch:
            cells = -(-shape.n_kv // CELL), -(-shape.n_q // CELL)
            self._launch(
                "combine", "survey", (-(-cells[0] // 8), cells[1], shape.mask_batch), argument
            )
        blocks, outer = shape.blocks(instance.rows), shape.heads_kv * shape.n3
        splits = shape.splits(route)
        heads = min(outer, max(1, call.device.sms // TOGETHER))
        grid = {
            "any": (blocks, splits, outer),
            "hopper": (heads, blocks, -(-outer // heads)),
            "tiles": (outer, blocks, splits),
        }.get(route, (splits, blocks, outer))
        mapped = route in ("hopper", "latent_hopper")
        whole = self._with_maps(argument) if mapped else argument
        early = argument.early > 0
        name = instance.name.replace(">", ", HalvesEnd>") if self._own_halves else instance.name
        self._launch(route, name, grid, whole, instance.threads, instance.shared, early)
        return argument

    @property
    def _own_halves(self) -> bool:
        """Whether the kernel writes rows of f16 in place of the result."""
        known = self.call.get("halves") is not None and self.call.unread
        return known and self.route == "hopper" and not self._extra

    @property
    def _merged(self) -> Ne:
        """The sizes of the result with all heads of a query in a row."""
        d, heads, n_q, n3 = self.call.out.ne
        return d * heads, n_q * n3, 1, 1

    def _early(self) -> int:
        """What `latent`, `latent_hopper` and `list_token` read before the wait. A survey of the
        mask or the decoding of keys is a launch before."""
        awaited = self.call.awaited
        if self.shape.mask_batch > 0 or self.route not in ("latent", "latent_hopper", "list_token"):
            return 0
        early = early_reads(awaited, {"q"})
        if self.route == "latent_hopper":
            return early if early == 2 and self.shape.type_k != "q8_0" else 0
        if self.shape.n_ids or early == 2:
            return early
        spans = {name for name in ("pos", "mask", "kv_len") if self.call.get(name) is not None}
        if awaited & spans:
            return 0
        return early or (SPANS if spans else 0)

    def _launch(
        self,
        file: str,
        name: str,
        grid: tuple[int, int, int],
        argument: Struct,
        threads: int = 256,
        shared: int = 0,
        early: bool = False,
    ) -> None:
        self.call.launch(
            f"attention_{file}.cu",
            name,
            grid=grid,
            block=threads,
            args=[argument],
            shared=shared,
            early=early,
            roomy=file == "list_token",
        )

    def _with_maps(self, argument: Attention) -> Struct:
        """The argument preceded by tensor maps of keys and values, in boxes of 64 columns."""
        kind = "bf16" if self.shape.type_k == "bf16" else "f16"

        def boxes(x: Operand, keys: int) -> TensorMap:
            if self.call.names_only:
                return TensorMap(opaque=(0,) * 16)
            return tensor_map(x.ptr, kind, x.ne, x.nb, (64, keys, 1, 1))

        pad = (0,) * 6
        if self.route == "latent_hopper":
            return LatentArgument(pad=pad, map=boxes(self.k, 64), a=argument)
        keys = HOPPER[self.shape.d_k, self.shape.d_v]
        maps, scales = (boxes(self.k, keys), boxes(self.v, keys)), 0
        if self._own_halves:
            rows, at = rows_and_scales(self._merged, self.call["halves"].ptr)
            argument.out, scales = int(rows), int(at)
            argument.nb_out = tuple(step // 2 for step in self.call.out.nb[1:])
        return HopperArgument(pad=pad, map_k=maps[0], map_v=maps[1], a=argument, scales=scales)

    def _decoded(self, x: Operand, nbytes: int) -> Operand:
        """Record the decoding of q8_0 to contiguous f16 in scratch."""
        to = self.call.scratch(nbytes)
        d, rows, heads, n3 = x.ne
        total = d // 32 * rows * heads * n3
        numbers = [np.int32(n) for n in (d // 32, rows, heads)]
        steps = [np.int64(n) for n in (*x.nb[1:], total)]
        self.call.launch(
            "attention_combine.cu",
            "decode_q8_0",
            grid=-(-total // 256),
            block=256,
            args=[x.pointer, np.uint64(to), *numbers, *steps],
        )
        return replace(x, ptr=to, nb=(2, 2 * d, 2 * d * rows, 2 * d * rows * heads))

    def argument(self) -> Attention:
        call, shape, attrs = self.call, self.shape, self.call.attrs
        # A window that reaches back past every position hides no key.
        window = self.window if self.window is not None and self.window < 2**31 else 0
        mask, pos, ids = self.mask or ABSENT, self.pos or ABSENT, call.get("ids") or ABSENT
        sinks, kv_len = call.get("sinks") or ABSENT, call.get("kv_len") or ABSENT
        return Attention(
            q=self.q.ptr,
            k=self.k.ptr,
            v=self.v.ptr,
            mask=mask.ptr,
            sinks=sinks.ptr,
            kv_len=kv_len.ptr,
            pos=pos.ptr,
            out=call.out.ptr,
            parts=self.parts,
            stats=self.stats,
            map=self.map,
            ids=ids.ptr,
            nb_q=self.q.nb[1:],
            nb_k=self.k.nb[1:],
            nb_v=self.v.nb[1:],
            nb_mask=mask.nb,
            nb_out=call.out.nb[1:],
            nb_ids=(ids.nb[0], ids.nb[1], ids.nb[3]),
            nb_sinks=sinks.nb[0],
            nb_pos=pos.nb[0],
            n_q=shape.n_q,
            n_kv=shape.n_kv,
            heads=shape.heads,
            heads_kv=shape.heads_kv,
            n3=shape.n3,
            d_k=shape.d_k,
            d_v=shape.d_v,
            mask_heads=mask.ne[2],
            mask_batch=mask.ne[3],
            window=window,
            kv0=attrs["kv0"],
            splits=shape.splits(self.route),
            head0=attrs["head0"],
            n_head=attrs["n_head"],
            lse=attrs["lse"],
            type_k=TYPES[shape.type_k],
            type_v=TYPES[shape.type_v],
            v_start=self.v_start,
            n_ids=shape.n_ids,
            pitch=shape.pitch(self.instance.rows),
            stride=self.stride,
            early=self._early(),
            scale=attrs["scale"],
            softcap=attrs["logit_softcap"],
            max_bias=attrs["max_bias"] if self._slopes else 0.0,
        )
