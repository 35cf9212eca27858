"""The attention layer of DeepSeek-2 (V2, V2-Lite, V3, R1) as a graph; reads from top to bottom.

T is the number of tokens, H of heads, R = kv_lora_rank, and n_kv the number of cache rows that the
attention reads. There are three forms of the attention, equal up to rounding. Head sizes of the
published models are in brackets:

form      cache of a layer                      attention runs over
standard  K [d_k, n_ctx, H], V [d_v, n_ctx, H]  K and V                   [192 / 128, H heads]
latent    rows [c | k_rope], [R + n_rot, n_ctx] the rows; V is their c    [576 / 512, one head of K]
expanded  as latent                             K and V of all its rows   [192 / 128, H heads]

The latent form moves the expansion of keys and values out of the attention: the queries absorb the
K part (`absorb`), and the V part is applied after the sum of values. A key then costs 2R + n_rot
multiplications per head instead of d_k + d_v [3.4 times as many], but reads only R + n_rot elements
instead of (d_k + d_v) H [1/9 in V2-Lite, 1/71 in V3]. This is best for decoding. The expanded form
is for prompts over the same cache.

A file stores the expansion as attn_kv_b, or as attn_k_b (transposed) and attn_v_b, or both, and
then each form uses the layout that suits it. Every form runs from either layout. If a form needs
the transpose of a K part stored in a block type, the graph casts that part to f16, which writes and
reads 2 R d_nope H bytes in each run [2 MiB a layer in V2-Lite, 16 MiB in V3]. This affects the
latent form from attn_kv_b, and the standard and expanded forms from attn_k_b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pyggml.dtypes import dtype
from pyggml.errors import GGUFError, GraphError, ShapeError, UnknownNameError
from pyggml.gguf import GGUFFile
from pyggml.gguf.reader import Names
from pyggml.models.config import DeepSeek2Config
from pyggml.node import Node
from pyggml.node import label as add_label
from pyggml.ops import (
    cast,
    concat,
    constant,
    cont,
    div,
    fill,
    flash_attn_ext,
    log,
    mul,
    mul_mat,
    permute,
    repeat,
    reshape,
    rms_norm,
    rope_ext,
    scale,
    set_rows,
    soft_max_ext,
    state,
    transpose,
    view,
)

FORMS = ("standard", "latent", "expanded")
#: [d, H, n] <-> [d, n, H]
SWAP = (0, 2, 1, 3)


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How a layer attends.

    form        "standard", "latent" or "expanded" (see the top of this file)
    flash       flash attention; False computes a tensor of scores and a softmax instead. The
                expanded form needs flash attention.
    cache_type  type of the states: f32, f16, bf16, or a block type that divides the rows
    """

    form: str = "latent"
    flash: bool = True
    cache_type: str = "f16"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UnknownNameError(f"no attention form {self.form!r}; use {', '.join(FORMS)}")
        if self.form == "expanded" and not self.flash:
            raise ShapeError(
                "form='expanded' needs flash attention: without it, K and V of all rows would be "
                "in memory next to the scores; use flash=True or form='latent'"
            )
        dtype(self.cache_type)


@dataclass(frozen=True, slots=True)
class Layer:
    """The hyperparameters and weights of layer `il`.

    `weights` has short names: "attn_q" is blk.0.attn_q.weight. Create a Layer once and use it in
    every graph, so that the plans of one store share its weights.
    """

    config: DeepSeek2Config
    weights: Mapping[str, Node]
    il: int = 0

    @staticmethod
    def of(file: GGUFFile, config: DeepSeek2Config, il: int = 0) -> Layer:
        """Layer `il` of an open file. No weights are read until a plan is bound.

        UnknownNameError if the file has no such layer.
        """
        if not 0 <= il < config.n_layer:
            raise UnknownNameError(
                f"no layer {il}: the file has {config.n_layer} layers, numbered from 0"
            )
        prefix, weights = f"blk.{il}.", Names[Node]()
        for name, info in file.tensors.items():
            key = name.removeprefix(prefix)
            if key == name or key.endswith(".input_scale"):
                continue
            array = file.array(name)
            if key in ("attn_k_b.weight", "attn_v_b.weight") and array.ndim == 2:
                # ik_llama.cpp stacks the heads' rows.
                rows, remainder = divmod(len(array), config.n_head)
                if remainder:
                    raise GGUFError(
                        f"tensor {name!r}: {len(array)} rows do not divide into "
                        f"{config.n_head} heads"
                    )
                array = array.reshape(config.n_head, rows, array.shape[1])
            weights[key.removesuffix(".weight")] = constant(array, dtype=info.dtype, name=name)
        return Layer(config, weights, il)

    def name(self, node: Node, label: str) -> Node:
        """`node` with llama.cpp's label for this layer, such as kq-3."""
        return add_label(node, f"{label}-{self.il}")

    def product(self, weight: str, x: Node) -> Node:
        """W x, times the weight's factor if it has one."""
        return self.scaled(weight, mul_mat(self.weights[weight], x))

    def scaled(self, weight: str, y: Node) -> Node:
        """y, a product of `weight`, times the weight's factor if it has one.

        NVFP4 quantizers store such a factor, because 8-bit block scales alone do not cover the
        range of a tensor.
        """
        factor = self.weights.get(f"{weight}.scale")
        return y if factor is None else mul(y, factor)


@dataclass(frozen=True, slots=True)
class Cache:
    """The states of a layer: K and V, or latent rows, which need no V."""

    k: Node
    v: Node | None = None

    @staticmethod
    def of(config: DeepSeek2Config, options: AttentionOptions, n_ctx: int, il: int = 0) -> Cache:
        """cache_k_l0 and cache_v_l0, or cache_kv_l0, with room for `n_ctx` tokens."""
        c, type_ = config, options.cache_type
        if options.form != "standard":
            return Cache(state(f"cache_kv_l{il}", type_, ne=(c.kv_lora_rank + c.n_rot, n_ctx)))
        return Cache(
            state(f"cache_k_l{il}", type_, ne=(c.d_k, n_ctx, c.n_head)),
            state(f"cache_v_l{il}", type_, ne=(c.d_v, n_ctx, c.n_head)),
        )


def attention(
    x: Node,
    pos: Node,
    ids: Node,
    mask: Node,
    layer: Layer,
    cache: Cache,
    options: AttentionOptions,
) -> Node:
    """The attention of one layer, which writes the new tokens to the cache and attends to it.

    x     f32         [n_embd, T]   norm(residual, attn_norm)
    pos   i32         [T]           positions
    ids   i32 or i64  [T]           cache rows to write; use `pos` if row j is for position j
    mask  f16         [n_kv, T]     causal_mask(pos, n_kv=n_kv); attention reads n_kv cache rows
    y     f32         [n_embd, T]   add it to the residual

    GraphError if the cache belongs to another form.
    """
    if (cache.v is None) == (options.form == "standard"):
        raise GraphError(
            f"this cache is not for form {options.form!r}; create it with Cache.of and the same "
            "options"
        )
    c, n_kv = layer.config, mask.ne[0]
    q = queries(layer, x, pos)
    kv_c, k_rope = latents(layer, x, pos)
    if cache.v is not None:
        k, v = expand(layer, kv_c, k_rope)
        k, v = written(cache.k, k, ids, n_kv), written(cache.v, v, ids, n_kv)
    else:
        row = concat(kv_c, k_rope, dim=0)
        if options.form == "latent":
            layer.name(row, "Kcur")  # in the expanded form, `expand` gives this label to K
        rows = written(cache.k, row, ids, n_kv)
        kv_c = view(rows, ne=(c.kv_lora_rank, n_kv))
        if options.form == "expanded":
            k_rope = view(rows, ne=(c.n_rot, n_kv), start=(c.kv_lora_rank,))
            k, v = expand(layer, plain(kv_c), plain(k_rope))
        else:
            q, k, v = absorb(layer, q), rows, kv_c
    y = attend(layer, layer.name(q, "Qcur"), k, v, mask, options.flash)
    if options.form == "latent":
        y = permute(v_product(layer, permute(y, axes=SWAP)), axes=SWAP)
    y = reshape(y if y.contiguous else cont(y), ne=(c.d_v * c.n_head, x.ne[1]))
    y = layer.product("attn_output", layer.name(y, "kqv_out"))
    return layer.name(y, "attn_out")


# -- queries, keys and values of the new tokens -------------------------------------------------


def queries(layer: Layer, x: Node, pos: Node) -> Node:
    """The heads' queries [nope | rope], [d_k, T, H], rotated and scaled by their temperature."""
    c = layer.config
    if c.q_lora_rank is None:
        q = layer.product("attn_q", x)
    else:
        q_a = norm(layer, layer.product("attn_q_a", x), "attn_q_a_norm")
        q = layer.product("attn_q_b", q_a)
    q = reshape(layer.name(q, "q"), ne=(c.d_k, c.n_head, x.ne[1]))
    q = rope(layer, q, pos, c.d_nope)
    if c.temperature_scale:
        q = mul(q, temperature(c, pos))
    return permute(q, axes=SWAP)


def temperature(c: DeepSeek2Config, pos: Node) -> Node:
    """f32 [1, 1, T]: 1 + temperature_scale ln(1 + floor(pos / temperature_length)).

    Mistral Large 3 uses it to sharpen the attention of late queries, as does Llama 4. Exact for
    positions up to 2^24, where f32 still represents every integer.
    """
    positions = cast(pos, dtype="f32")
    periods = div(positions, fill(positions, value=float(c.temperature_length)))
    periods = cast(cast(periods, dtype="i32"), dtype="f32")  # the cast to i32 truncates
    factors = scale(log(scale(periods, s=1.0, b=1.0)), s=c.temperature_scale, b=1.0)
    return reshape(factors, ne=(1, 1, pos.ne[0]))


def latents(layer: Layer, x: Node, pos: Node) -> tuple[Node, Node]:
    """c [R, T], normalized, and k_rope [n_rot, T], rotated; all heads share them for K and V."""
    c, n_tokens = layer.config, x.ne[1]
    kv_a = layer.name(layer.product("attn_kv_a_mqa", x), "kv_cmpr_pe")
    kv_c = norm(layer, view(kv_a, ne=(c.kv_lora_rank, n_tokens)), "attn_kv_a_norm")
    k_rope = view(kv_a, ne=(c.n_rot, n_tokens), start=(c.kv_lora_rank,))
    k_rope = rope(layer, reshape(k_rope, ne=(c.n_rot, 1, n_tokens)), pos)
    k_rope = reshape(layer.name(k_rope, "k_pe"), ne=(c.n_rot, n_tokens))
    return layer.name(kv_c, "kv_cmpr"), k_rope


def norm(layer: Layer, x: Node, weight: str) -> Node:
    """rms_norm(x) * weight."""
    return mul(rms_norm(x, eps=layer.config.rms_eps), layer.weights[weight])


def rope(layer: Layer, x: Node, pos: Node, offset: int = 0) -> Node:
    """x [.., n_head, T] with n_rot elements of each row, starting at `offset`, rotated."""
    c = layer.config
    return rope_ext(
        x,
        pos,
        n_dims=c.n_rot,
        offset=offset,
        n_ctx_orig=c.n_ctx_orig,
        freq_base=c.rope_freq_base,
        freq_scale=c.freq_scale,
        ext_factor=c.ext_factor,
        attn_factor=c.rope_attn_factor,
        beta_fast=c.yarn_beta_fast,
        beta_slow=c.yarn_beta_slow,
    )


def written(cache: Node, rows: Node, ids: Node, n_kv: int) -> Node:
    """The first n_kv rows of a cache after `rows` are written to its rows `ids`."""
    return view(set_rows(cache, rows, ids), ne=(cache.ne[0], n_kv, cache.ne[2]))


# -- from latent rows to heads ------------------------------------------------------------------


def expand(layer: Layer, kv_c: Node, k_rope: Node) -> tuple[Node, Node]:
    """K [d_k, n, H] = [W_k c | k_rope] and V [d_v, n, H] = W_v c, both of c's type (f32 or f16)."""
    c, w, n, type_ = layer.config, layer.weights, kv_c.ne[1], kv_c.dtype.name

    def product(weight: str, a: Node, b: Node) -> Node:
        """a b in c's type. If there is a factor, a b alone may exceed f16, so that one is f32."""
        if f"{weight}.scale" not in w:
            return mul_mat(a, b, dtype=type_)
        y = layer.scaled(weight, mul_mat(a, b))
        return y if type_ == "f32" else cast(y, dtype=type_)

    def heads(y: Node, d: int) -> Node:
        return permute(reshape(y, ne=(d, c.n_head, n)), axes=SWAP)

    if "attn_kv_b" in w:
        kv = layer.name(product("attn_kv_b", w["attn_kv_b"], kv_c), "kv")
        kv = heads(kv, c.d_nope + c.d_v)
        k_nope = view(kv, ne=(c.d_nope, n, c.n_head))
        v = view(kv, ne=(c.d_v, n, c.n_head), start=(c.d_nope,))
    else:
        k_nope = transpose(product("attn_k_b", kv_c, transpose(unpacked(w["attn_k_b"]))))
        v_b = reshape(w["attn_v_b"], ne=(c.kv_lora_rank, c.d_v * c.n_head))
        v = heads(product("attn_v_b", v_b, kv_c), c.d_v)
    k = concat(k_nope, repeat(k_rope, ne=(c.n_rot, n, c.n_head)), dim=0)
    return layer.name(k, "Kcur"), layer.name(v, "Vcur")


def absorb(layer: Layer, q: Node) -> Node:
    """Queries for latent rows: [nope | rope] [d_k, T, H] -> [W_k^T nope | rope] [R + n_rot, T, H].

    (W_k c) . q = c . (W_k^T q)
    """
    c, n_tokens = layer.config, q.ne[1]
    q_nope = view(q, ne=(c.d_nope, n_tokens, c.n_head))
    q_rope = view(q, ne=(c.n_rot, n_tokens, c.n_head), start=(c.d_nope,))
    if "attn_k_b" in layer.weights:
        q_nope = layer.product("attn_k_b", q_nope)
    else:
        k_part = transpose(unpacked(_kv_b(layer, 0, c.d_nope)))
        q_nope = layer.scaled("attn_kv_b", mul_mat(k_part, q_nope))
    return concat(layer.name(q_nope, "q_nope_absorbed"), q_rope, dim=0)


def v_product(layer: Layer, y: Node) -> Node:
    """W_v y [d_v, n, H], from y [R, n, H]."""
    c = layer.config
    if "attn_v_b" in layer.weights:
        return layer.product("attn_v_b", y)
    return layer.scaled("attn_kv_b", mul_mat(_kv_b(layer, c.d_nope, c.d_v), y))


def _kv_b(layer: Layer, start: int, n: int) -> Node:
    """Rows start .. start + n of each head of attn_kv_b, [R, n, H]."""
    c = layer.config
    by_head = (c.kv_lora_rank, c.d_nope + c.d_v, c.n_head)
    heads = reshape(layer.weights["attn_kv_b"], ne=by_head)
    return view(heads, ne=(c.kv_lora_rank, n, c.n_head), start=(0, start))


# -- attention ----------------------------------------------------------------------------------


def attend(layer: Layer, q: Node, k: Node, v: Node, mask: Node, flash: bool) -> Node:
    """softmax(scale k.q + mask) v: [d_v, H, T] from q [d_k, T, H], k and v [.., n_kv, H or 1].

    Without flash attention, V must be transposed, so a V in a block type is cast to f16 first. The
    attention memory budget counts that copy and cuts it together with the scores.
    """
    kq_scale = layer.config.kq_scale
    if flash:
        return layer.name(flash_attn_ext(q, k, v, mask, scale=kq_scale), "kqv")
    kq = layer.name(mul_mat(k, q), "kq")
    kq = layer.name(soft_max_ext(kq, mask, scale=kq_scale), "kq_soft_max")
    kqv = layer.name(mul_mat(transpose(unpacked(v)), kq), "kqv")
    return permute(kqv, axes=SWAP)


def unpacked(a: Node) -> Node:
    """`a`, cast to f16 if it has a block type, because rows of blocks cannot be transposed."""
    return cast(a, dtype="f16") if a.dtype.block > 1 else a


def plain(a: Node) -> Node:
    """`a`, cast to f16 unless it is f32 or f16, the types that a product can have."""
    return a if a.dtype.name in ("f32", "f16") else cast(a, dtype="f16")
