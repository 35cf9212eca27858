"""The kernel of a matrix product, its scratch and its precision. Needs no device.

    columns of b    block types                         f32, f16, bf16
    up to 8         vec: 16-bit fixed-point b           vec_plain (f16, bf16: 1 column)
    more            tile: f16 on the tensor cores       cublas, in the type of a; exact

`exact` takes f32 weights of up to 256 rows, and f16 and bf16 with prec="f32".

Block matrices of more than 8 Mi elements use `vec` only up to 4 columns. On the tensor cores mxfp4
is decoded to bf16. On 9.0, `tile` with more than 128 columns or with experts is the kernel of
ring.py where that can compute it. With prec="f32", block types always use `vec` with 24-bit b,
plain types f32 products.

With experts, up to 64 (token, slot) pairs are one product each (`vec`, `vec_plain`). More pairs are
sorted by expert, and a tile multiplies up to 128 of them (`tile`, also for f16 and bf16; f32 would
lose too much precision), or 64 or 256 (`ring`). With prec="f32" each pair stays its own product,
which is slow for many.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear import blocks, exact, experts, plain
from pyggml.backends.cuda.linear.common import FEW, LARGE, aligned, in_blocks, shape_of
from pyggml.backends.cuda.linear.halves import CLASS, half_of, tile_scratch
from pyggml.dtypes import F32, DType
from pyggml.node import Node
from pyggml.spec import Ne

#: Columns up to which f16 and bf16 weights do not go to cuBLAS.
FEW_HALVES = 1
#: (token, slot) pairs up to which each pair is its own product.
FEW_PAIRS = 64
#: Precision classes, the least exact one last.
EXACTNESS = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product: weights of type `dtype` and sizes `a`, activations of sizes `b`.

    ids    sizes of the ids that choose an expert's matrix; None without experts
    exact  whether precision below f32 is forbidden
    """

    dtype: DType
    a: Ne
    b: Ne
    ids: Ne | None
    exact: bool

    @staticmethod
    def of(node: Node, weights: str | None = None) -> Product:
        """The product with the node's operand `weights`, by default the first of its weights."""
        a, b = node[weights or node.op.weights[0]], node["b"]
        ids = None if node.op.ids is None else node[node.op.ids.operand].ne
        return Product(a.dtype, a.ne, b.ne, ids, node.attrs["prec"] == "f32")

    @staticmethod
    def all_of(node: Node) -> tuple[Product, ...]:
        """One product per weight of the node: up, then gate."""
        return tuple(Product.of(node, weights) for weights in node.op.weights)

    @property
    def route(self) -> str:
        """vec, tile, vec_plain, exact or cublas."""
        if in_blocks(self.dtype):
            return "vec" if self.is_few else "tile"
        if self.is_few:
            return "vec_plain"
        if self.ids is not None:
            return "tile"
        in_f32 = self.exact or self.dtype is F32
        return "exact" if in_f32 and exact.can_take(self.a) else "cublas"

    @property
    def is_few(self) -> bool:
        """Whether the product is bound by reading the weights."""
        if self.ids is not None:
            pairs = self.ids[0] * self.ids[1]
            has_tile = self.dtype is not F32 and not self.a[0] % 32
            return self.exact or pairs <= FEW_PAIRS or not has_tile
        columns = shape_of(self.a, self.b).columns
        if in_blocks(self.dtype):
            large = self.a[0] * self.a[1] > LARGE
            return self.exact or columns <= (FEW // 2 if large else FEW)
        return columns <= (FEW if self.exact or self.dtype is F32 else FEW_HALVES)

    @property
    def levels(self) -> int:
        """Bytes per value of b in the fixed point that `vec` reads; 0 for other routes."""
        return 0 if self.route != "vec" else 3 if self.exact else 2

    @property
    def scratch(self) -> int:
        if self.route == "vec":
            return aligned(blocks.fixed_bytes(self.b, self.levels))
        if self.route == "tile":
            if self.ids is None:
                return tile_scratch(self.b) + blocks.split_scratch(self.a, self.b)
            groups = experts.group_scratch(self.ids, self.a[2])
            return experts.columns_scratch(self.dtype, self.a, self.b, self.ids) + groups
        if self.route == "exact":
            return exact.scratch(self.a, self.b)
        if self.route == "cublas":
            return plain.cublas_scratch(self.a, self.dtype, self.b, self.exact)
        return 0

    @property
    def in_order(self) -> bool:
        """Whether it reads its columns in the order of experts, so no other product reads them."""
        return self.ids is not None and experts.in_order(self.dtype, self.a, self.ids)

    @property
    def numeric(self) -> str:
        """The precision class."""
        if self.exact or self.route in ("vec_plain", "exact"):
            return "f32"
        if self.route == "vec":
            return "f16"
        return CLASS[half_of(self.dtype)] if self.route == "tile" else self.dtype.name

    def launches(self, call: Call, a: tuple[Operand, ...], y: Operand) -> None:
        """Record y = a b, or for up and gate (if `together` allows) y = act(gate b) * (up b)."""
        b = call["b"]
        if self.ids is None:
            if self.route == "vec":
                blocks.vec(call, a, b, y, self.levels)
            elif self.route == "tile":
                blocks.tile(call, a, b, y)
            elif self.route == "vec_plain":
                plain.vec_plain(call, a[0], b, y)
            elif self.route == "exact":
                exact.launches(call, a[0], b, y)
            else:
                plain.cublas(call, a[0], b, y, self.exact)
        elif self.route == "tile" and experts.can_tile(a[0]):
            experts.tile(call, a, b, call["ids"], y)
        elif in_blocks(self.dtype):
            experts.vec(call, a, b, call["ids"], y, self.levels)
        else:
            experts.vec_plain(call, a[0], b, call["ids"], y)


def widest(*classes: str) -> str:
    """The precision class of a result computed through all of these."""
    return max(classes, key=EXACTNESS.index)


def together(up: Operand, gate: Operand) -> bool:
    """Whether one kernel can compute both products: same block type, same layout."""
    return up.dtype is gate.dtype and in_blocks(up.dtype) and up.layout == gate.layout
