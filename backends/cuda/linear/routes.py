"""Which kernel a matrix product takes, what it needs and how exact it is. Needs no device.

    columns of b    block types                         f32, f16, bf16
    up to 8         vec: 16-bit fixed-point b           vec_plain (f16, bf16: 1 column)
    more            tile: f16 on the tensor cores       cublas, in the type of a

Of block matrices with more than 8 Mi elements up to 4 columns are `vec`'s. mxfp4 is bf16 on the
tensor cores. prec="f32" keeps to `vec` with 24-bit b for block types, and to f32 products for plain
ones.

By expert, up to 64 pairs of token and slot are a product each (`vec`, `vec_plain`); more are sorted
by expert, and a tile of the product meets up to 128 of them (`tile`, f16 and bf16 too; f32 would
lose too much). prec="f32" keeps to a product for each pair: slow for many pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear import blocks, experts, plain
from pyggml.backends.cuda.linear.common import FEW, LARGE, aligned, in_blocks, shape_of
from pyggml.dtypes import F32, DType
from pyggml.node import Ne, Node

#: Columns up to which f16 and bf16 weights are not left to cuBLAS.
FEW_HALVES = 1
#: Pairs of token and slot up to which each is a product of its own.
FEW_PAIRS = 64
#: The least exact class comes last.
EXACTNESS = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product: weights of a type and of sizes `a`, activations of sizes `b`.

    ids    sizes of the ids that choose an expert's matrix; None where there is one matrix
    exact  whether nothing less than f32 is allowed
    """

    kind: DType
    a: Ne
    b: Ne
    ids: Ne | None
    exact: bool

    @staticmethod
    def of(node: Node, weights: str | None = None) -> Product:
        """The product with those of the node's weights, the first if not named."""
        a, b = node[weights or node.op.weights[0]], node["b"]
        ids = None if node.op.ids is None else node[node.op.ids.operand].ne
        return Product(a.dtype, a.ne, b.ne, ids, node.attrs["prec"] == "f32")

    @staticmethod
    def all_of(node: Node) -> tuple[Product, ...]:
        """A product for each of the node's weights: up, then gate."""
        return tuple(Product.of(node, weights) for weights in node.op.weights)

    @property
    def route(self) -> str:
        """vec, tile, vec_plain or cublas."""
        if in_blocks(self.kind):
            return "vec" if self.is_few else "tile"
        if self.is_few:
            return "vec_plain"
        return "cublas" if self.ids is None else "tile"

    @property
    def is_few(self) -> bool:
        """Whether reading the weights is all that counts."""
        if self.ids is not None:
            pairs, has_tile = self.ids[0] * self.ids[1], self.kind is not F32 and not self.a[0] % 32
            return self.exact or pairs <= FEW_PAIRS or not has_tile
        columns = shape_of(self.a, self.b).columns
        if in_blocks(self.kind):
            large = self.a[0] * self.a[1] > LARGE
            return self.exact or columns <= (FEW // 2 if large else FEW)
        return columns <= (FEW if self.exact or self.kind is F32 else FEW_HALVES)

    @property
    def levels(self) -> int:
        """Bytes of a number of b in the fixed point that `vec` reads; 0 for other routes."""
        return 0 if self.route != "vec" else 3 if self.exact else 2

    @property
    def scratch(self) -> int:
        if self.route == "vec":
            return aligned(blocks.fixed_bytes(self.b, self.levels))
        if self.route == "tile":
            if self.ids is None:
                more = blocks.split_scratch(self.a, self.b)
            else:
                more = experts.group_scratch(self.ids, self.a[2])
            return blocks.tile_scratch(self.b) + more
        if self.route == "cublas":
            return plain.cublas_scratch(self.a, self.kind, self.b, self.exact)
        return 0

    @property
    def numeric(self) -> str:
        """The class of its numbers."""
        if self.exact or self.route == "vec_plain":
            return "f32"
        if self.route == "vec":
            return "f16"
        return blocks.CLASS[blocks.half_of(self.kind)] if self.route == "tile" else self.kind.name

    def launches(self, call: Call, a: tuple[Operand, ...], y: Operand) -> None:
        """Record y = a b; of up and gate, where `together` allows, y = act(gate b) * (up b)."""
        b = call["b"]
        if self.ids is None:
            if self.route == "vec":
                blocks.vec(call, a, b, y, self.levels)
            elif self.route == "tile":
                blocks.tile(call, a, b, y)
            elif self.route == "vec_plain":
                plain.vec_plain(call, a[0], b, y)
            else:
                plain.cublas(call, a[0], b, y, self.exact)
        elif self.route == "tile" and experts.can_tile(a[0]):
            experts.tile(call, a, b, call["ids"], y)
        elif in_blocks(self.kind):
            experts.vec(call, a, b, call["ids"], y, self.levels)
        else:
            experts.vec_plain(call, a[0], b, call["ids"], y)


def widest(*classes: str) -> str:
    """The class of a result that is computed through all of these."""
    return max(classes, key=EXACTNESS.index)


def together(up: Operand, gate: Operand) -> bool:
    """Whether one kernel computes both products: of one block type, kept alike."""
    return up.dtype is gate.dtype and in_blocks(up.dtype) and up.layout == gate.layout
