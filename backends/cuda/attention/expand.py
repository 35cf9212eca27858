"""Keys of the expanded form of latent attention: cuBLAS writes each head's product into K, beside
the part that all heads share. A product of all heads at once is in another order: it was copied."""

from __future__ import annotations

from dataclasses import replace

from pyggml import ops
from pyggml.backends.cuda.copy import copy
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import part
from pyggml.backends.cuda.launch import WORKSPACE, Call
from pyggml.backends.cuda.linear import plain
from pyggml.backends.cuda.linear.routes import Product
from pyggml.dtypes import F16, F32
from pyggml.node import Node


def expanded_keys(node: Node, run: Run) -> Fused | None:
    """concat(w c as [d, n, heads], repeat(k)), with w c [d heads, n] and k [n_rot, n]."""
    heads, repeated = node["a"], node["b"]
    product = heads.base
    if node.attrs["dim"] != 0 or product.op is not ops.mul_mat or repeated.op is not ops.repeat:
        return None
    if not run.only(product, node) or not run.only(repeated, node):
        return None
    w, c, k = product["a"], product["b"], repeated["a"]
    (d, n, count, n3), size = heads.ne, heads.dtype.nbytes
    fits = (
        heads.offset == product.offset
        and heads.nb[:3] == (size, size * d * count, size * d)
        and product.ne == (d * count, n, 1, 1)
        and n3 == 1
        and k.ne[1:] == (n, 1, 1)
        and repeated.ne == (k.ne[0], n, count, 1)
        and Product.of(product).route == "cublas"
        and w.contiguous
        and w.dtype is c.dtype
        and (node.dtype is F32 or w.dtype is F16)
        and c.nb[0] == c.dtype.nbytes
        and c.nb[1] >= c.ne[0] * c.nb[0]
        and product.attrs["prec"] != "f32"
    )
    if not fits:
        return None
    reads = {"w": w, "c": c, "k": k}
    return Fused((product, repeated, node), reads, _record, workspace=WORKSPACE)


def _record(call: Call) -> None:
    w, c, k, y = call["w"], call["c"], call["k"], call.out
    d, heads, step = y.ne[0] - k.ne[0], y.ne[2], w.nb[1]
    w = replace(w, ne=(w.ne[0], d, heads, 1), nb=(w.nb[0], step, d * step, heads * d * step))
    c = replace(c, ne=(c.ne[0], c.ne[1], heads, 1), nb=(*c.nb[:2], 0, 0))
    plain.cublas(call, w, c, part(y, 0, 0, d), exact=False)
    copy(call, part(y, 0, d, k.ne[0]), k)
