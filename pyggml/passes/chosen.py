"""A choice among rows that take turns over devices: `top_k` of scores of which each has a part.

The rows of a device that the whole graph would choose are the best of its own, so the best k of
each device are candidates. They are sorted by their numbers before the best of all are chosen. So
of equal scores the lower row comes first, as in the whole graph, and the result is equal to the
last bit. Each device sends 8 bytes a candidate.

Gathering all scores lost: the devices would send, and each would hold, 4 bytes for every row and
token: 256 MiB for 512 tokens over 131,072 rows, where 2,048 candidates of two devices take 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyggml.node import Node
from pyggml.ops.collective import all_gather
from pyggml.ops.copy import cast, concat, cont, get_rows
from pyggml.ops.elementwise import scale
from pyggml.ops.reduce import argsort, top_k
from pyggml.ops.views import reshape, view
from pyggml.passes.bodies import Recursive

if TYPE_CHECKING:
    from pyggml.passes.sharded import Builder


def choice(builder: Builder, node: Node, d: int) -> Recursive[Node]:
    """`node`, a top_k, on device number `d`."""
    parts = []
    for i, other in enumerate(builder.groups[node]):
        parts.append((yield _candidates(builder, node, i, other)))

    def put(new: Node) -> Node:
        return builder.put(new, d, node)

    def column(pairs: Node, number: int) -> Node:
        """[n, T, m] of pairs [2, n, T, m]."""
        one = view(pairs, ne=(1, *pairs.ne[1:]), start=(number, 0, 0, 0))
        return put(reshape(put(cont(one)), ne=pairs.ne[1:]))

    pairs = put(all_gather(*parts, dim=1, rank=d))
    order = put(argsort(column(pairs, 1), order="asc"))
    pairs = put(get_rows(pairs, order))
    best = put(top_k(column(pairs, 0), k=node.attrs["k"]))
    numbers = put(reshape(column(pairs, 1), ne=(1, *pairs.ne[1:])))
    chosen = put(cast(put(get_rows(numbers, best)), dtype="i32"))
    return put(reshape(chosen, ne=node.ne[: node.spec.rank]))


def _candidates(builder: Builder, node: Node, i: int, d: int) -> Recursive[Node]:
    """The best of a device's own rows, f32 [2, n, T, m]: scores, and numbers in the whole graph.

    i   the device's number in the group
    Numbers are exact up to 2^24.
    """
    key = ("candidates", node, d)
    if key in builder.memo:
        return builder.memo[key]
    family = builder.divisions.choices[node]
    part, (_, n_tokens, ne2, ne3) = family[i], node.ne

    def put(new: Node) -> Node:
        return builder.put(new, d, node)

    scores = yield builder.part(node["a"], family, i, d)
    if not scores.contiguous:
        scores = put(cont(scores))
    scores = put(reshape(scores, ne=(part.n, n_tokens, ne2 * ne3)))
    best = put(top_k(scores, k=min(node.attrs["k"], part.n)))
    values = put(get_rows(put(reshape(scores, ne=(1, *scores.ne[:3]))), best))
    number = put(scale(put(cast(best, dtype="f32")), s=float(part.step), b=float(part.start)))
    number = put(reshape(number, ne=(1, *number.ne[:3])))
    new = builder.memo[key] = put(concat(values, number, dim=0))
    return new
