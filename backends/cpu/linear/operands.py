"""The operands of products: how matrices and activations are stored, and where they begin."""

from __future__ import annotations

from dataclasses import dataclass

from pyggml.backends.cpu.linear.columns import TILE, X_BYTES
from pyggml.backends.cpu.linear.inner import WIDE, How, Inner
from pyggml.backends.cpu.linear.quantize import quantize
from pyggml.backends.cpu.linear.widen import widen
from pyggml.backends.cpu.native.isa import multiplies_tiles
from pyggml.backends.cpu.rows import adjacent
from pyggml.backends.cpu.table import Call
from pyggml.backends.cpu.weights.tiles import may_be_tiled, part_of
from pyggml.backends.host_tiles import FORMS, GROUP, ROWS
from pyggml.backends.processors import n_threads
from pyggml.dtypes import TYPES
from pyggml.node import Node
from pyggml.ops.leaf import constant_op
from pyggml.transfer import origin

FLOATS = ("f32", "f16", "bf16")

#: Bytes of weights that a thread takes at once; less if there are too few for all threads. At the
#: end of a share a thread has fetched 8 KiB of the next one, which another thread often takes. With
#: 64 KiB a token of V2-Lite takes at least 4 % longer; 1 MiB measures the same.
SHARE = 1 << 18
#: Bytes of columns that a thread takes at once, so that they stay in its cache.
BLOCK = 1 << 17
#: Columns of a matrix from which AMX is used; of experts, how many each has on average. Measured on
#: 16 processors of a Xeon, 4096 x 4096: with 32 columns, block types are as fast as by dot products
#: of bytes, with 64 they are 1.1 to 1.3 times as fast, with 512 1.4 to 1.6; f16 gains from 16 on.
MANY, MANY_FLOATS = 48, 16


# -- in the graph ---------------------------------------------------------------------------------


def quantizes(node: Node) -> bool:
    """Whether the product quantizes its activations."""
    blocks = all(node[name].dtype.name in FORMS for name in node.op.weights)
    return blocks and node.attrs["prec"] == "default"


def uses_amx(node: Node) -> bool:
    """Whether the product rounds weights and activations to bf16 and has many columns. f32 weights
    are not rounded, nor states."""
    if node.attrs["prec"] != "default" or not multiplies_tiles():
        return False
    many = MANY_FLOATS
    for weight in (node[name] for name in node.op.weights):
        many = max(many, MANY * (weight.dtype.name in FORMS))
        plain = weight.dtype.name in ("f16", "bf16") and adjacent(weight)
        constant = origin(weight.root).op is constant_op
        if weight.dtype.name not in FORMS and not (plain and constant):
            return False
    n_experts = node[node.op.weights[0]].ne[2] if "ids" in node.op.operands else 0
    return (node["ids"].spec.elements if n_experts else node["b"].ne[1]) >= many * max(1, n_experts)


def numeric(node: Node) -> str:
    """The numeric class of a product."""
    return "bf16" if uses_amx(node) else "quantized" if quantizes(node) else "f32"


def refusal(node: Node) -> str | None:
    """Why no product here can be the node; None if one can."""
    if node.dtype.name not in ("f32", "f16"):
        return f"{node.op.name} does not write {node.dtype}"
    for name in node.op.weights:
        weight = node[name]
        if weight.dtype.name in FORMS:
            if not may_be_tiled(node, name):
                return f"{node.op.name} needs constants of block types, from 16 rows to 16 rows"
        elif weight.dtype.name not in FLOATS:
            return f"{node.op.name} does not multiply {weight.dtype}"
        elif not adjacent(weight) and not _transposed(weight):
            return f"{node.op.name} needs adjacent elements in rows or columns of {name}"
    return None


def _transposed(a: Node) -> bool:
    return a.ne[1] == 1 or a.nb[1] == a.dtype.nbytes


def _direct(node: Node) -> bool:
    """Whether the product reads its activations as they are."""
    b = node["b"]
    return not quantizes(node) and b.dtype.name == "f32" and adjacent(b)


def _tile_bytes(node: Node) -> int:
    """Bytes of activations in tiles of bf16."""
    b = node["b"]
    if "ids" in node.op.operands:
        pairs = node["ids"].spec.elements
        blocks = pairs // ROWS + min(pairs, node[node.op.weights[0]].ne[2])
    else:
        blocks = -(-b.ne[1] // ROWS) * b.ne[2] * b.ne[3]
    return blocks * -(-b.ne[0] // GROUP) * TILE


def x_bytes(node: Node) -> int:
    """Bytes of the scratch for activations."""
    if uses_amx(node):
        return _tile_bytes(node)
    if _direct(node):
        return 0
    elements = node["b"].spec.elements
    return elements // GROUP * X_BYTES if quantizes(node) else 4 * elements


# -- in memory ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Matrices:
    """Where a weight is, for the loops of `inner.py`: byte strides of 16 rows and matrices."""

    inner: Inner
    ptr: int
    tile: int
    nb2: int
    nb3: int
    m: int
    k: int
    stride: int

    def share(self, nbytes: int, others: int) -> int:
        """Tiles that a thread takes at once, of `nbytes`, if there are that many others."""
        tiles = -(-self.m // ROWS)
        most = max(1, nbytes // max(1, self.nbytes))
        return max(1, min(most, tiles * others // (4 * n_threads()), tiles))

    @property
    def nbytes(self) -> int:
        """Of 16 rows."""
        return self.tile if self.inner.how != "lanes" else self.tile * self.k


def matrices(call: Call, name: str) -> Matrices:
    """A weight of the product."""
    node, at = call.node[name], call[name]
    if at.type in FORMS:
        part = part_of(node)
        assert part is not None
        how: How = "quantized" if quantizes(call.node) else "exact"
        ptr = call.root(name).ptr + part.offset
        steps = part.tile, part.nb2, part.nb3
        return Matrices(Inner(at.type, how), ptr, *steps, at.ne[1], at.ne[0] // GROUP, 0)
    size = TYPES[at.type].nbytes
    if at.ne[0] == 1 or at.nb[0] == size:
        tile, stride, how = ROWS * at.nb[1], at.nb[1], "rows"
    else:
        tile, stride, how = ROWS * size, at.nb[0], "lanes"
    return Matrices(Inner(at.type, how), at.ptr, tile, *at.nb[2:], at.ne[1], at.ne[0], stride)


def reads(call: Call, name: str) -> tuple[int, int]:
    """What a product reads in any case, for `call.add`: the first matrix of a constant."""
    weights = matrices(call, name)
    if origin(call.node[name].root).op is not constant_op or weights.inner.how == "lanes":
        return 0, 0
    return weights.ptr, -(-weights.m // ROWS) * weights.tile


@dataclass(frozen=True, slots=True)
class Columns:
    """Where activations are: byte strides."""

    ptr: int
    nb1: int
    nb2: int
    nb3: int

    @property
    def width(self) -> int:
        """Columns that a thread takes at once."""
        return max(1, BLOCK // (self.nb1 * WIDE)) * WIDE


def activations(call: Call) -> Columns:
    """Add what turns the product's b into columns, if anything must."""
    b, node = call["b"], call.node
    if _direct(node):
        return Columns(b.ptr, *b.nb[1:])
    k, rows = b.ne[0], b.ne[1] * b.ne[2] * b.ne[3]
    if quantizes(node):
        kernel, length, row = quantize(b.type), k // GROUP, k // GROUP * X_BYTES
    else:
        kernel, length, row = widen(b.type), k, 4 * k
    call.add(
        kernel, call.scratch, b.ptr, *b.nb, b.ne[1], b.ne[2], rows, length, work=2 * b.elements
    )
    return Columns(call.scratch, row, row * b.ne[1], row * b.ne[1] * b.ne[2])
