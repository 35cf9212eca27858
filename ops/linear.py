"""Matrix products: dense, and by expert id."""

from __future__ import annotations

from typing import Any

from pyggml.dtypes import F32, DTypeLike
from pyggml.dtypes import dtype as dtype_of
from pyggml.errors import ShapeError
from pyggml.node import Node
from pyggml.operation import op
from pyggml.ops.rules import (
    DECODABLE_FLOATS,
    FLOATS,
    Precision,
    choose,
    want_index,
    want_ne,
    want_readable,
    want_rows,
    want_type,
)
from pyggml.spec import Spec
from pyggml.traits import Axis, Cost, Cut, Ids, Slice

__all__ = ["mul_mat", "mul_mat_id"]


@op(weights=("a",))
def mul_mat(
    a: Node, b: Node, *, prec: Precision = "default", dtype: DTypeLike = "f32"
) -> Spec | tuple[Spec, dict[str, Any]]:
    """Matrix product of rows:  y[i, j, p, q] = sum_k a[k, i, p // r2, q // r3] b[k, j, p, q].

    a  any float or block type  [k, m, A2, A3]     r2 = B2 / A2, r3 = B3 / A3 (whole numbers)
    b  f32, f16, bf16           [k, n, B2, B3]
    y  f32, or f16 on request   [m, n, B2, B3]

    Sums are f32. a may be transposed unless it has a block type.
    prec  "f32" computes products in f32; "default" lets a backend quantize b (NMSE at most 5e-4)
    """
    want_readable("a", a)
    want_type("b", b, DECODABLE_FLOATS)
    result = dtype_of(choose("dtype", dtype_of(dtype).name, FLOATS))
    if a.dtype.block > 1:
        want_rows("a", a)
    if a.ne[0] != b.ne[0]:
        raise ShapeError(f"inner dimensions differ: a.ne[0]={a.ne[0]}, b.ne[0]={b.ne[0]}")
    for axis in (2, 3):
        if b.ne[axis] % a.ne[axis]:
            raise ShapeError(
                f"a.ne[{axis}]={a.ne[axis]} does not divide b.ne[{axis}]={b.ne[axis]}; "
                "only a is repeated, never b"
            )
    rank = max(a.spec.rank, b.spec.rank, 2)
    return Spec.of(result, (a.ne[1], *b.ne[1:]), rank), {"dtype": result.name}


@mul_mat.cost
def _(node: Node) -> Cost:
    a, b = node["a"], node["b"]
    read = float(a.spec.nbytes + b.spec.nbytes + node.spec.nbytes)
    return Cost(2.0 * node.spec.elements * a.ne[0], read)


@mul_mat.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    a, b = node["a"], node["b"]
    if axis == 0:
        return Slice((Cut(1), None))
    if axis == 1:
        return Slice((None, Cut(1)))
    if axis == "k":
        return Slice((Cut(0), Cut(0)), merge="sum") if n % a.dtype.block == 0 else None
    assert isinstance(axis, int)
    if a.ne[axis] == 1:
        return Slice((None, Cut(axis)))
    ratio = b.ne[axis] // a.ne[axis]
    # b's heads that share a head of a form a group; a piece is whole groups or within one.
    if n % ratio and ratio % n:
        return None
    return Slice((Cut(axis, div=ratio), Cut(axis)))


def want_experts(experts: Node, b: Node, ids: Node, what: str) -> None:
    """Check the operands of a product by expert id."""
    want_readable(what, experts)
    want_type("b", b, FLOATS)
    want_index("ids", ids)
    want_rows(what, experts)
    if experts.ne[0] != b.ne[0]:
        raise ShapeError(
            f"inner dimensions differ: {what}.ne[0]={experts.ne[0]}, b.ne[0]={b.ne[0]}"
        )
    want_ne("ids", ids, (ids.ne[0], b.ne[2], 1, 1), "[n_used, n_tokens], n_tokens = b.ne[2]")
    if experts.ne[3] != 1 or b.ne[3] != 1:
        raise ShapeError(
            f"{what} and b must have three dimensions, but their ne3 are "
            f"{experts.ne[3]} and {b.ne[3]}"
        )
    if ids.ne[0] % b.ne[1]:
        raise ShapeError(f"b.ne[1]={b.ne[1]} rows per token do not divide n_used={ids.ne[0]}")


def expert_slices(node: Node, axis: Axis, n: int) -> Slice | None:
    """The slice rule of products by expert id: y [m, n_used, n_tokens] from matrices, b and ids."""
    matrices = len(node.op.weights)
    if axis == 0:
        return Slice((*(Cut(1),) * matrices, None, None))
    if axis == "k":
        whole = matrices == 1 and n % node[node.op.weights[0]].dtype.block == 0
        return Slice((Cut(0), Cut(0), None), merge="sum") if whole else None
    if axis == 1:
        n_b = node["b"].ne[1]
        if n_b not in (1, node.ne[1]):
            return None
        return Slice((*(None,) * matrices, None if n_b == 1 else Cut(1), Cut(0)))
    return Slice((*(None,) * matrices, Cut(2), Cut(1))) if axis == 2 else None


def expert_cost(node: Node) -> Cost:
    """The cost of products by expert id: each chosen matrix is read once."""
    matrices = [node[name] for name in node.op.weights]
    touched = min(matrices[0].ne[2], node["ids"].spec.elements)
    weights = sum(m.spec.nbytes // m.ne[2] * touched for m in matrices)
    flops = 2.0 * matrices[0].ne[0] * node.spec.elements * len(matrices)
    others = sum(t.spec.nbytes for t in (node["b"], node["ids"], node))
    return Cost(flops, float(weights + others))


def expert_ids(node: Node) -> Node | None:
    """The ids of products by expert id; None for any other op."""
    ids = node.op.ids
    return node[ids.operand] if ids is not None and ids.of in node.op.weights else None


def expected_share(node: Node) -> float:
    """The share of its matrices that a product by expert id is expected to read if ids are random;
    1 for any other op."""
    ids = expert_ids(node)
    if ids is None:
        return 1.0
    return float(1 - (1 - 1 / node[node.op.weights[0]].ne[2]) ** ids.spec.elements)


@op(
    weights=("experts",),
    ids=Ids("ids", of="experts", axis=2),
    cost=expert_cost,
    slices=expert_slices,
)
def mul_mat_id(experts: Node, b: Node, ids: Node, *, prec: Precision = "default") -> Spec:
    """Product with the chosen matrices:  y[:, e, t] = experts[:, :, ids[e, t]] b[:, e % n_b, t].

    experts  any float or block type  [k, m, n_expert]
    b        f32 or f16               [k, n_b, n_tokens]     n_b divides n_used
    ids      i32                      [n_used, n_tokens]
    y        f32                      [m, n_used, n_tokens]
    prec     "default" or "f32"       as in mul_mat
    A negative id gives a zero row.
    Errors: IdError on the host for an id >= n_expert. A GPU treats such an id as negative; with
    PYGGML_CUDA_DEBUG=1 it raises the IdError too, except inside loops.
    """
    want_experts(experts, b, ids, "experts")
    return Spec.of(F32, (experts.ne[1], ids.ne[0], ids.ne[1]), 3)
