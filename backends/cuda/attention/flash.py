"""flash_attn_ext: one of six kernels, their argument, and what runs before and after them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.attention.routes import CELL, HOPPER, STATIC, TYPES, Instance, Shape
from pyggml.backends.cuda.device.tensormap import tensor_map
from pyggml.backends.cuda.fusion import Fused, Run, fuses
from pyggml.backends.cuda.launch import Call, Operand, Value
from pyggml.backends.cuda.table import kernel
from pyggml.node import Node


def _refuses(node: Node) -> str | None:
    _, k, v, *_ = node.src
    assert k is not None and v is not None
    for what, source in (("keys", k), ("values", v)):
        if source.dtype.name not in TYPES:
            return f"flash_attn_ext does not read {what} of {source.dtype}"
    if max(k.ne[0], v.ne[0]) > 576:
        return f"flash_attn_ext takes heads of 576 at most, not {k.ne[0]} and {v.ne[0]}"
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
    _Attention(call, call.src).record()


def flash_attn_causal(call: Call, pos: Operand, window: int | None) -> None:
    """The same for a node whose mask is causal_mask(pos, window): the mask is never built.

    The call's operand 3 is not read. Scratch is less than that of flash_attn_ext.
    """
    _Attention(call, (*call.src[:3], None, *call.src[4:]), pos, window).record()


@fuses(ops.flash_attn_ext)
def absorb_causal_mask(node: Node, run: Run) -> Fused | None:
    """The pattern of flash_attn_causal. A mask that attentions share is built by none of them."""
    mask = node.src[3]
    if mask is None or mask.op is not ops.causal_mask or mask not in run.number:
        return None
    readers = run.readers[mask]
    if not run.only(mask, *(r for r in readers if r.op is ops.flash_attn_ext and r.src[3] is mask)):
        return None
    pos, window = mask.src[0], mask.attrs["window"]
    assert pos is not None
    present = [i for i, s in enumerate(node.src) if s is not None and i != 3]

    def record(call: Call) -> None:
        src: list[Operand | None] = [None] * 6
        for i, operand in zip(present, call.src[1:]):
            src[i] = operand
        _Attention(call, src, call.operand(0), window).record()

    reads = (pos, *(s for s in node.src if s is not None and s is not mask))
    scratch = Shape.of(node, fused=True).scratch()
    return Fused((mask, node), reads, record, scratch=scratch, again=(mask,))


class _Attention:
    """One node being recorded. src: q, k, v, mask, sinks, kv_len; `pos` in the place of a mask."""

    def __init__(
        self,
        call: Call,
        src: Sequence[Operand | None],
        pos: Operand | None = None,
        window: int | None = None,
    ) -> None:
        q, k, v, self.mask, self.sinks, self.kv_len = src
        assert q is not None and k is not None and v is not None
        self.call, self.q, self.k, self.v, self.pos, self.window = call, q, k, v, pos, window
        self.shape = Shape.of(call.node, fused=self.mask is None)
        self.v_start = self.parts = self.stats = self.map = 0
        self.route = next(r for r in self.shape.routes if self._fits(r))
        self.instance = self._instance(self.route)

    def _instance(self, route: str) -> Instance:
        extra = self.mask is not None or self.call.attrs["logit_softcap"] > 0
        return self.shape.instance(route, self.call.device.shared - STATIC, extra)

    def _fits(self, route: str) -> bool:
        """Whether addresses, strides and the device suit a kernel."""
        if route == "any":
            return True
        grain = 4 if self.shape.type_k == "q8_0" else 16
        if not (self.k.aligned(grain) and self.v.aligned(grain)):
            return False
        if self.mask is not None and self.mask.nb[0] != 2:
            return False
        if route.startswith("latent"):
            start = self._inside()
            if start is None or start % (8 if route == "latent" else 64):
                return False
            self.v_start = start
        if "hopper" in route and self.call.device.arch != "90a":
            return False
        made = self._instance(route)
        few = self.shape.rows <= 65535 * made.rows
        return few and made.shared + STATIC <= self.call.device.shared

    def _inside(self) -> int | None:
        """At which element of a row of keys its values begin, if they are a part of it."""
        k, v = self.k, self.v
        if any(a != b for n, a, b in zip(k.ne[1:], k.nb[1:], v.nb[1:]) if n > 1):
            return None
        start, rest = divmod(v.ptr - k.ptr, k.dtype.nbytes)
        start *= k.dtype.block
        return start if rest == 0 <= start <= k.ne[0] - v.ne[0] else None

    def record(self) -> None:
        call, shape, route, made = self.call, self.shape, self.route, self.instance
        sizes = zip((self.k, self.v), shape.decoded(route))
        self.k, self.v = (self._decoded(x, n) if n else x for x, n in sizes)
        if shape.splits(route) > 1:
            self.parts, self.stats = (call.scratch(n) for n in shape.parts(route))
        if self.mask is not None:
            self.map = call.scratch(shape.map)
        argument = self._argument()
        if self.mask is not None:
            cells = -(-shape.n_kv // CELL), -(-shape.n_q // CELL)
            self._launch(
                "combine", "survey", (-(-cells[0] // 8), cells[1], shape.mask_batch), argument
            )
        blocks, outer = -(-shape.rows // made.rows), shape.heads_kv * shape.n3
        splits = shape.splits(route)
        grid = {
            "any": (blocks, splits, outer),
            "hopper": (outer, blocks, 1),
            "tiles": (outer, blocks, splits),
        }.get(route, (splits, blocks, outer))
        whole = self._with_maps(argument) if "hopper" in route else argument
        self._launch(route, made.name, grid, whole, made.threads, made.shared)
        if splits > 1:
            lanes = 4 if shape.d_v % 4 == 0 else 1
            grid = shape.n3 * shape.n_q * shape.heads, -(-shape.d_v // (32 * lanes)), 1
            self._launch("combine", f"combine<{lanes}>", grid, argument)

    def _launch(
        self,
        file: str,
        name: str,
        grid: tuple[int, int, int],
        argument: Value,
        threads: int = 256,
        shared: int = 0,
    ) -> None:
        self.call.launch(
            f"attention_{file}.cu",
            name,
            grid=grid,
            block=threads,
            args=[argument],
            shared=shared,
        )

    def _with_maps(self, argument: Value) -> Value:
        """The argument behind tensor maps of keys and values, in boxes of 64 columns.

        Maps must lie at multiples of 64, and parameters begin at 0x210 on 9.0: hence 48 bytes.
        """
        kind = "bf16" if self.shape.type_k == "bf16" else "f16"
        latent = self.route == "latent_hopper"
        keys = 64 if latent else HOPPER[self.shape.d_k, self.shape.d_v]
        sources = (self.k,) if latent else (self.k, self.v)
        maps = (tensor_map(x.ptr, kind, x.ne, x.nb, (64, keys, 1, 1)) for x in sources)
        return Value(bytes(48) + b"".join(m.data for m in maps) + argument.data)

    def _decoded(self, x: Operand, nbytes: int) -> Operand:
        """q8_0 as f16 in scratch, without gaps."""
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

    def _argument(self) -> Value:
        """The struct Attention of attention.cuh."""
        call, shape, attrs = self.call, self.shape, self.call.attrs
        sinks, mask, pos = self.sinks, self.mask, self.pos

        def ptr(x: Operand | None) -> int:
            return 0 if x is None else x.ptr

        pointers = (self.q, self.k, self.v, mask, sinks, self.kv_len, pos, call.out)
        nb = [*self.q.nb[1:], *self.k.nb[1:], *self.v.nb[1:]]
        nb += [*(mask.nb if mask is not None else (0,) * 4), *call.out.nb[1:]]
        nb += [sinks.nb[0] if sinks is not None else 0, pos.nb[0] if pos is not None else 0]
        numbers = [
            shape.n_q,
            shape.n_kv,
            shape.heads,
            shape.heads_kv,
            shape.n3,
            shape.d_k,
            shape.d_v,
        ]
        numbers += [mask.ne[2], mask.ne[3]] if mask is not None else [1, 1]
        # One that reaches back past every position that there is hides nothing.
        window = self.window if self.window is not None and self.window < 2**31 else 0
        numbers += [window, attrs["kv0"], shape.splits(self.route), attrs["head0"]]
        numbers += [attrs["n_head"], attrs["lse"], TYPES[shape.type_k], TYPES[shape.type_v]]
        floats = (
            attrs["scale"],
            attrs["logit_softcap"],
            attrs["max_bias"] if mask is not None else 0,
        )
        return Value(
            struct.pack(
                "<11Q18q18i3f4x",
                *(ptr(x) for x in pointers),
                self.parts,
                self.stats,
                self.map,
                *nb,
                *numbers,
                self.v_start,
                *floats,
            )
        )
