"""Why a step does not take the fast kernel for its op: for profiles, so that no path is slow in
silence. The conditions are those of linear/routes.py, attention/routes.py and indexer.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pyggml import ops
from pyggml.backends.cuda.attention.routes import C_TYPES, HOPPER, LATENT, PAIRS, Shape
from pyggml.backends.cuda.indexer import why_plain
from pyggml.backends.cuda.linear.common import in_blocks
from pyggml.backends.cuda.linear.routes import FEW_PAIRS, Product
from pyggml.backends.step import Step, innermost
from pyggml.dtypes import F32
from pyggml.node import Node


def reason(step: Step, names: Sequence[str]) -> str:
    """Why the kernels `names` are slower ones, as a phrase; empty if they are not."""
    phrases = dict.fromkeys(
        phrase
        for inner in innermost(step)
        for node in inner.nodes
        for phrase in _reasons(node, names)
    )
    return "; ".join(phrases)


def _reasons(node: Node, names: Sequence[str]) -> Iterator[str]:
    if node.op is ops.flash_attn_ext:
        yield from _of_attention(Shape.of(node), names)
    elif node.op is ops.lightning_indexer:
        if " scores_any<" in _joined(names):
            yield why_plain(node) or (
                "an indexer's queries or rows are not aligned, or do not fit this device"
            )
    elif node.op.weights:
        products = Product.all_of(node)
        for product in products:
            yield from _of_product(product, names)
        if "gate_rows" in names and not products[0].exact:
            if all(in_blocks(product.dtype) for product in products):
                yield "up and gate differ in type or layout, so they are two products"
            else:
                kind = products[0].dtype
                yield f"up and gate of {kind} are two products; those of blocks are one"


def _of_product(product: Product, names: Sequence[str]) -> Iterator[str]:
    what = f"{product.dtype} weights"
    if product.exact and replace(product, exact=False).route != product.route:
        yield 'prec="f32" keeps products off the tensor cores'
    elif product.ids is None:
        if product.route == "cublas" and product.dtype is F32:
            yield f"{what} are multiplied in f32, without tensor cores"
        elif product.route == "cublas" and product.exact:
            yield f'prec="f32" decodes {what} to f32, without tensor cores'
    elif product.ids[0] * product.ids[1] > FEW_PAIRS and product.route != "tile":
        if product.dtype is F32:
            yield f"experts with {what} have no tensor-core kernel"
        else:
            yield f"experts' rows of {product.a[0]} elements are not whole blocks of 32"
    elif product.route == "tile" and not in_blocks(product.dtype) and "vec_plain" in _joined(names):
        yield "the experts' rows are not aligned to 8 bytes"


def _of_attention(shape: Shape, names: Sequence[str]) -> Iterator[str]:
    best, joined = shape.routes[0], _joined(names)
    if best == "any":
        yield _general(shape)
    elif f" {best}<" not in joined:
        if "hopper" in best:
            yield "the kernel for compute capability 9.0 does not fit this device or these strides"
        else:
            yield f"the kernel {best} does not fit these addresses and strides, or this device"


def _general(shape: Shape) -> str:
    """Why an attention has only the kernel for all cases."""
    if shape.exact:
        return 'prec="f32" keeps attention off the tensor cores'
    if shape.type_k != shape.type_v:
        return f"K of {shape.type_k} and V of {shape.type_v} have no tensor-core kernel"
    if shape.type_k not in C_TYPES:
        return f"K and V of {shape.type_k} have no tensor-core kernel"
    pair = shape.d_k, shape.d_v
    sizes = HOPPER if shape.type_k == "q8_0" else PAIRS
    known = ", ".join(f"{d_k}/{d_v}" for d_k, d_v in (*sizes, *LATENT))
    return f"heads of {pair[0]}/{pair[1]} have no tensor-core kernel; {shape.type_k} has {known}"


def _joined(names: Sequence[str]) -> str:
    """All names in a string, in which `split<` is not the end of another name."""
    return " ".join(("", *names))
