"""The parts that layers are made of, as functions of nodes and numbers.

T is the number of tokens of the batch. `w` is a Layer, or the model's Weights for its head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyggml import ops
from pyggml.models.keys import Keys, key
from pyggml.models.weights import Layer, Weights
from pyggml.node import Node
from pyggml.ops import (
    add,
    cast,
    cont,
    div,
    fill,
    flash_attn_ext,
    fused_up_gate,
    get_rows,
    glu,
    log,
    mul,
    mul_mat,
    permute,
    reshape,
    rms_norm,
    rope_ext,
    scale,
    silu,
    soft_max_ext,
    transpose,
    view,
)

#: [d, H, n] <-> [d, n, H]
SWAP = (0, 2, 1, 3)


def norm(w: Layer | Weights, name: str, x: Node, eps: float) -> Node:
    """rms_norm(x) * weight."""
    return mul(rms_norm(x, eps=eps), w[name])


def layer_norm(w: Layer | Weights, name: str, x: Node, eps: float) -> Node:
    """LayerNorm: (x - mean) / sqrt(var + eps) * weight + bias, over rows."""
    return add(mul(ops.norm(x, eps=eps), w[name]), w[f"{name}.bias"])


def scaled(w: Layer | Weights, name: str, y: Node) -> Node:
    """y, a product with the weight `name` or rows of it, times its factor, plus its bias, if any.

    NVFP4 quantizers store such a factor, because 8-bit block scales alone do not cover the range of
    a tensor.
    """
    factor, bias = w.get(f"{name}.scale"), w.get(f"{name}.bias")
    y = y if factor is None else mul(y, factor)
    return y if bias is None else add(y, bias)


def linear(w: Layer | Weights, name: str, x: Node) -> Node:
    """W x, with the weight's factor and bias, if any."""
    return scaled(w, name, mul_mat(w[name], x))


# -- rope ---------------------------------------------------------------------------------------


def _n_ctx(keys: Keys) -> int:
    return keys.integer("context_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotary embedding that a file's keys describe.

    A factor of 0 means 1. Scaling "none" ignores the factor. The two betas are used as in
    transformers; llama.cpp ignores them in most architectures, and computes with 32 and 1.
    """

    freq_base: float = key("rope.freq_base", 10000.0)
    scaling: str = key("rope.scaling.type", "linear", choices=("none", "linear", "yarn"))
    factor: float = key("rope.scaling.factor", 1.0, older="rope.scale_linear", zero=True)
    n_ctx_orig: int = key("rope.scaling.original_context_length", _n_ctx)
    attn_factor: float = key("rope.scaling.attn_factor", 1.0, rare=True)
    beta_fast: float = key("rope.scaling.yarn_beta_fast", 32.0, rare=True)
    beta_slow: float = key("rope.scaling.yarn_beta_slow", 1.0, rare=True)

    @property
    def freq_scale(self) -> float:
        """rope_ext's freq_scale."""
        return 1.0 if self.scaling == "none" or not self.factor else 1.0 / self.factor

    @property
    def ext_factor(self) -> float:
        """rope_ext's ext_factor."""
        return 1.0 if self.scaling == "yarn" else 0.0

    def rotate(
        self,
        x: Node,
        pos: Node,
        *,
        n_rot: int,
        mode: Literal["normal", "neox"],
        offset: int = 0,
        attn_factor: float | None = None,
        freq_factors: Node | None = None,
        back: bool = False,
    ) -> Node:
        """x [d, n_head, T] with n_rot elements of each row, starting at `offset`, rotated.

        back  by the negative angles
        """
        return rope_ext(
            x,
            pos,
            freq_factors,
            n_dims=n_rot,
            mode=mode,
            offset=offset,
            n_ctx_orig=self.n_ctx_orig,
            freq_base=self.freq_base,
            freq_scale=self.freq_scale,
            ext_factor=self.ext_factor,
            attn_factor=self.attn_factor if attn_factor is None else attn_factor,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            back=back,
        )


# -- attention ----------------------------------------------------------------------------------


def attend(
    layer: Layer,
    q: Node,
    k: Node,
    v: Node,
    mask: Node,
    *,
    scale: float,
    flash: bool,
    sinks: Node | None = None,
    ids: Node | None = None,
) -> Node:
    """softmax(scale k.q + mask) v: [d_v, H, T] from q [d_k, T, H], k and v [.., n_kv, H_kv].

    ids  i32 [n, T], the rows of k and v that a token attends to; None: all. One head of k and v,
         and v is a view of k's first elements
    Without flash attention, V must be transposed, so a V in a block type is cast to f16 first. The
    attention memory budget counts that copy and cuts it together with the scores.
    """
    if flash:
        y = flash_attn_ext(q, k, v, mask, sinks, ids=ids, scale=scale)
        return layer.label(y, "kqv")
    if ids is not None:
        q, k, v, mask = listed(q, k, v, mask, ids)
    kqv = attend_plain(layer, q, k, v, mask, scale=scale, sinks=sinks)
    if ids is not None:
        return reshape(kqv, ne=(kqv.ne[0], *kqv.ne[2:]))
    return permute(kqv, axes=SWAP)


def attend_plain(
    layer: Layer, q: Node, k: Node, v: Node, mask: Node, *, scale: float, sinks: Node | None
) -> Node:
    """`attend` without flash attention, for any number n of streams: [d_v, T, H, n]."""
    kq = layer.label(mul_mat(k, q), "kq")
    kq = layer.label(soft_max_ext(kq, mask, sinks, scale=scale), "kq_soft_max")
    return layer.label(mul_mat(transpose(unpacked(v)), kq), "kqv")


def listed(q: Node, k: Node, v: Node, mask: Node, ids: Node) -> tuple[Node, Node, Node, Node]:
    """Operands in which each token has keys of its own, f16 (or f32) copies of rows ids[:, t].

    q [d, 1, H, T], k [d, n, 1, T], v [d_v, n, 1, T], mask [n, 1, 1, T]
    """
    n, n_tokens = ids.ne[:2]
    rows = get_rows(view(k, ne=k.ne[:2]), reshape(ids, ne=(n * n_tokens,)))
    rows = reshape(rows, ne=(k.ne[0], n, 1, n_tokens))
    if k.dtype.name != "f32":
        rows = cast(rows, dtype="f16")
    values = view(rows, ne=(v.ne[0], n, 1, n_tokens))
    seen = get_rows(reshape(mask, ne=(1, *mask.ne[:2])), ids)
    seen = cast(reshape(seen, ne=(n, 1, 1, n_tokens)), dtype="f16")
    return permute(q, axes=(0, 3, 2, 1)), rows, values, seen


def tempered(q: Node, pos: Node, *, strength: float, length: int) -> Node:
    """q [d, H, T] times 1 + strength ln(1 + floor(pos / length)), which sharpens late queries.

    Mistral Large 3 and Llama 4 use it. Exact for positions up to 2^24, where f32 still represents
    every integer.
    """
    positions = cast(pos, dtype="f32")
    periods = div(positions, fill(positions, value=float(length)))
    periods = cast(cast(periods, dtype="i32"), dtype="f32")  # the cast to i32 truncates
    factors = scale(log(scale(periods, s=1.0, b=1.0)), s=strength, b=1.0)
    return mul(q, reshape(factors, ne=(1, 1, pos.ne[0])))


def unpacked(a: Node) -> Node:
    """`a`, cast to f16 if it has a block type, because rows of blocks cannot be transposed."""
    return cast(a, dtype="f16") if a.dtype.block > 1 else a


def joined(y: Node) -> Node:
    """[d, H, T] -> [d H, T]."""
    return reshape(y if y.contiguous else cont(y), ne=(y.ne[0] * y.ne[1], y.ne[2]))


# -- feed-forward -------------------------------------------------------------------------------


def mlp_tensors(n_embd: int, n_ff: int, suffix: str = "") -> dict[str, tuple[int, ...]]:
    """The tensors of `swiglu_mlp`."""
    return {
        f"ffn_gate{suffix}": (n_embd, n_ff),
        f"ffn_up{suffix}": (n_embd, n_ff),
        f"ffn_down{suffix}": (n_ff, n_embd),
    }


def bias_tensors(sizes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The bias of each of these matrices; `linear` adds it if a file has it."""
    return {f"{name}.bias": ne[1:] for name, ne in sizes.items() if len(ne) == 2}


def silu_gated(gate: Node, up: Node, limit: float | None = None) -> Node:
    """silu(gate) * up; with a limit c, silu(min(gate, c)) * clamp(up, -c, c)."""
    if limit is None:
        return mul(silu(gate), up)
    return glu(gate, up, limit=limit)


def swiglu_mlp(
    layer: Layer, x: Node, suffix: str = "", *, fused: bool, limit: float | None = None
) -> Node:
    """down(silu_gated(gate x, up x)): f32 [n_embd, T].

    suffix  of the names ffn_up, ffn_gate and ffn_down, such as _shexp
    fused   up, gate and activation as one op, unless they have factors or biases
    limit   of `silu_gated`
    """
    up, gate = f"ffn_up{suffix}", f"ffn_gate{suffix}"
    if fused and not extras(layer, up, gate):
        hidden = fused_up_gate(layer[up], layer[gate], x, limit=limit)
    else:
        hidden = silu_gated(linear(layer, gate, x), linear(layer, up, x), limit)
    return linear(layer, f"ffn_down{suffix}", hidden)


def extras(layer: Layer, *names: str) -> bool:
    """Whether any of these weights has a factor or a bias, which the fused ops do not support."""
    return any(f"{name}.{suffix}" in layer for name in names for suffix in ("scale", "bias"))
