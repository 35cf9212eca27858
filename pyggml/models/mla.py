"""DeepSeek's latent attention, in three forms that are equal up to rounding.

T is the number of tokens, H of heads, R = kv_lora_rank, and n_kv the number of cache rows that the
attention reads. Head sizes of the published models are in brackets:

form      cache of a layer                      attention runs over
standard  K [d_k, n_ctx, H], V [d_v, n_ctx, H]  K and V                   [192 / 128, H heads]
latent    rows [c | k_rope], [R + n_rot, n_ctx] the rows; V is their c    [576 / 512, one head of K]
expanded  as latent                             K and V of all its rows   [192 / 128, H heads]

The latent form moves the expansion of keys and values out of the attention: the queries absorb the
K part (`absorb`), and the V part is applied after the sum of values. A key then costs 2R + n_rot
multiplications per head instead of d_k + d_v [3.4 times as many], but reads only R + n_rot elements
instead of (d_k + d_v) H [1/9 in V2-Lite, 1/71 in V3]. This is best for decoding. The expanded form
is for prompts over the same cache; it needs flash attention, because without it K and V of all rows
would be in memory next to the scores.

A file stores the expansion as attn_kv_b, or as attn_k_b (transposed) and attn_v_b, or both, and
then each form uses the layout that suits it. Every form runs from either layout. If a form needs
the transpose of a K part, the graph makes it, in f16 if the part has a block type: 2 R d_nope H
bytes [2 MiB a layer in V2-Lite, 16 MiB in V3]. A plan keeps them if they are a small part of its
weights (`passes/fold.py`), and else computes them in each run. This affects the latent form from
attn_kv_b, and the standard and expanded forms from attn_k_b.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyggml.errors import GraphError
from pyggml.models.batch import Batch
from pyggml.models.cache import Cache
from pyggml.models.layers import SWAP, attend, joined, linear, norm, scaled, unpacked
from pyggml.models.weights import Layer
from pyggml.node import Node
from pyggml.ops import cast, concat, cont, mul_mat, permute, repeat, reshape, transpose, view

#: (x [.., n_head, T], offset) -> x with n_rot elements of each row, from `offset`, rotated.
Rotate = Callable[[Node, int], Node]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mla:
    """The numbers of the attention.

    q_lora_rank  None: one attn_q instead of attn_q_a and attn_q_b
    kq_scale     of q.k
    """

    n_head: int
    q_lora_rank: int | None
    kv_lora_rank: int
    d_nope: int
    n_rot: int
    d_v: int
    eps: float
    kq_scale: float

    @property
    def d_k(self) -> int:
        """Head size of keys in the standard form."""
        return self.d_nope + self.n_rot


def mla(
    layer: Layer,
    x: Node,
    cache: Cache,
    batch: Batch,
    a: Mla,
    rotate: Rotate,
    *,
    form: str,
    temperature: Callable[[Node], Node] | None = None,
    choose: Callable[[Node], Node | None] | None = None,
) -> Node:
    """The attention of one layer: f32 [n_embd, T]; x is normalized.

    temperature  applied to the queries [d_k, n_head, T] after their rotation
    choose       the rows that each token attends to, i32 [k, T], from the input of attn_q_b; None:
                 all. A choice needs the latent form
    """
    if len(cache.states) != (2 if form == "standard" else 1):
        names = " and ".join(str(state.attrs["name"]) for state in cache.states)
        raise GraphError(f"{names}: not a cache for form '{form}'; build both from equal options")
    q_a = query_latents(layer, x, a)
    ids = choose(q_a) if choose else None
    q = queries(layer, q_a, a, rotate)
    q = permute(temperature(q) if temperature else q, axes=SWAP)
    kv_c, k_rope = latents(layer, x, a, rotate)
    if form == "standard":
        k, v = expand(layer, kv_c, k_rope, a)
        k, v = cache.write(0, k, batch), cache.write(1, v, batch)
    else:
        row = concat(kv_c, k_rope, dim=0)
        if form == "latent":
            layer.label(row, "Kcur")  # in the expanded form, `expand` gives this label to K
        rows = cache.write(0, row, batch)
        kv_c = view(rows, ne=(a.kv_lora_rank, rows.ne[1]))
        if form == "expanded":
            k_rope = view(rows, ne=(a.n_rot, rows.ne[1]), start=(a.kv_lora_rank,))
            k, v = expand(layer, plain(kv_c), plain(k_rope), a)
        else:
            q, k, v = absorb(layer, q, a), rows, kv_c
    mask, flash = cache.mask(batch), batch.options.flash
    y = attend(layer, layer.label(q, "Qcur"), k, v, mask, ids=ids, scale=a.kq_scale, flash=flash)
    if form == "latent":
        y = permute(v_product(layer, permute(y, axes=SWAP), a), axes=SWAP)
    return layer.label(linear(layer, "attn_output", layer.label(joined(y), "kqv_out")), "attn_out")


# -- queries, keys and values of the new tokens -------------------------------------------------


def query_latents(layer: Layer, x: Node, a: Mla) -> Node:
    """The input of attn_q_b [q_lora_rank, T], normalized; x if there is only attn_q."""
    if a.q_lora_rank is None:
        return x
    return norm(layer, "attn_q_a_norm", linear(layer, "attn_q_a", x), a.eps)


def queries(layer: Layer, q_a: Node, a: Mla, rotate: Rotate) -> Node:
    """The heads' queries [nope | rope], [d_k, H, T], rotated."""
    q = linear(layer, "attn_q" if a.q_lora_rank is None else "attn_q_b", q_a)
    q = reshape(layer.label(q, "q"), ne=(a.d_k, a.n_head, q_a.ne[1]))
    return rotate(q, a.d_nope)


def latents(layer: Layer, x: Node, a: Mla, rotate: Rotate) -> tuple[Node, Node]:
    """c [R, T], normalized, and k_rope [n_rot, T], rotated; all heads share them for K and V."""
    n_tokens = x.ne[1]
    kv_a = layer.label(linear(layer, "attn_kv_a_mqa", x), "kv_cmpr_pe")
    kv_c = norm(layer, "attn_kv_a_norm", view(kv_a, ne=(a.kv_lora_rank, n_tokens)), a.eps)
    k_rope = view(kv_a, ne=(a.n_rot, n_tokens), start=(a.kv_lora_rank,))
    k_rope = rotate(reshape(k_rope, ne=(a.n_rot, 1, n_tokens)), 0)
    k_rope = reshape(layer.label(k_rope, "k_pe"), ne=(a.n_rot, n_tokens))
    return layer.label(kv_c, "kv_cmpr"), k_rope


# -- from latent rows to heads ------------------------------------------------------------------


def expand(layer: Layer, kv_c: Node, k_rope: Node, a: Mla) -> tuple[Node, Node]:
    """K [d_k, n, H] = [W_k c | k_rope] and V [d_v, n, H] = W_v c, both of c's type (f32 or f16)."""
    n, type_ = kv_c.ne[1], kv_c.dtype.name

    def product(name: str, w: Node, b: Node) -> Node:
        """w b in c's type. If there is a factor, w b alone may exceed f16, so that one is f32."""
        if f"{name}.scale" not in layer:
            return mul_mat(w, b, dtype=type_)
        y = scaled(layer, name, mul_mat(w, b))
        return y if type_ == "f32" else cast(y, dtype=type_)

    def heads(y: Node, d: int) -> Node:
        return permute(reshape(y, ne=(d, a.n_head, n)), axes=SWAP)

    if "attn_kv_b" in layer:
        kv = layer.label(product("attn_kv_b", layer["attn_kv_b"], kv_c), "kv")
        kv = heads(kv, a.d_nope + a.d_v)
        k_nope = view(kv, ne=(a.d_nope, n, a.n_head))
        v = view(kv, ne=(a.d_v, n, a.n_head), start=(a.d_nope,))
    else:
        k_b = reshape(_turned(layer["attn_k_b"]), ne=(a.kv_lora_rank, a.d_nope * a.n_head))
        k_nope = heads(product("attn_k_b", k_b, kv_c), a.d_nope)
        v_b = reshape(layer["attn_v_b"], ne=(a.kv_lora_rank, a.d_v * a.n_head))
        v = heads(product("attn_v_b", v_b, kv_c), a.d_v)
    k = concat(k_nope, repeat(k_rope, ne=(a.n_rot, n, a.n_head)), dim=0)
    return layer.label(k, "Kcur"), layer.label(v, "Vcur")


def absorb(layer: Layer, q: Node, a: Mla) -> Node:
    """Queries for latent rows: [nope | rope] [d_k, T, H] -> [W_k^T nope | rope] [R + n_rot, T, H].

    (W_k c) . q = c . (W_k^T q)
    """
    n_tokens = q.ne[1]
    q_nope = view(q, ne=(a.d_nope, n_tokens, a.n_head))
    q_rope = view(q, ne=(a.n_rot, n_tokens, a.n_head), start=(a.d_nope,))
    if "attn_k_b" in layer:
        q_nope = linear(layer, "attn_k_b", q_nope)
    else:
        k_part = _turned(_kv_b(layer, 0, a.d_nope, a))
        q_nope = scaled(layer, "attn_kv_b", mul_mat(k_part, q_nope))
    return concat(layer.label(q_nope, "q_nope_absorbed"), q_rope, dim=0)


def v_product(layer: Layer, y: Node, a: Mla) -> Node:
    """W_v y [d_v, n, H], from y [R, n, H]."""
    if "attn_v_b" in layer:
        return linear(layer, "attn_v_b", y)
    return scaled(layer, "attn_kv_b", mul_mat(_kv_b(layer, a.d_nope, a.d_v, a), y))


def _kv_b(layer: Layer, start: int, n: int, a: Mla) -> Node:
    """Rows start .. start + n of each head of attn_kv_b, [R, n, H]."""
    heads = reshape(layer["attn_kv_b"], ne=(a.kv_lora_rank, a.d_nope + a.d_v, a.n_head))
    return view(heads, ne=(a.kv_lora_rank, n, a.n_head), start=(0, start))


def _turned(w: Node) -> Node:
    """The transpose of a weight in a tensor of its own, so that products read whole rows."""
    return cont(transpose(unpacked(w)))


def plain(a: Node) -> Node:
    """`a`, cast to f16 unless it is f32 or f16, the types that a product can have."""
    return a if a.dtype.name in ("f32", "f16") else cast(a, dtype="f16")
