"""Spreads a graph over several devices: `compile(.., shard={"heads": 2, "experts": 2})`.

The pass runs after `assign`, when all ops have kernels, and before `fold` and `budget`, so that
derived constants and attention budgets are those of each device. It knows no model. `stages` says
which devices compute a node, `divisions` what they compute in parts, from the slice rules of the
ops; `sharded` builds the graph, from the outputs back to parts of weights and states.

The result is one graph with the nodes of all devices. Each device has leaves of its own: parts of
weights are slices of the file's memory, in whole rows and blocks; a state is cut, or every device
has all of it. Collectives (ops/collective.py) are nodes with a `rank`. So everything that comes
after, memory, splits, drawings, comparisons, works as for any graph, and one process can run it
with several devices, or many processes with one each.

The design that lost has one graph for all devices, in which a node stands for the parts of each. It
has fewer nodes to plan, and its text does not grow with the number of devices. But parts may differ
(uneven cards, 6 heads over 4 devices), stages of a pipeline and pinned nodes are not on every
device, and the memory of each device would need a plan of its own. Nearly every pass would have to
ask which device is meant.

Another design starts from the weights and lets the cuts spread forward until something needs a
whole tensor. Then somebody has to say how each weight is cut, and that is the model. Going back
from a product through the slice rules finds the heads, the states and the weights.
"""

from __future__ import annotations

from dataclasses import replace

from pyggml.errors import GraphError
from pyggml.node import Node
from pyggml.passes.divisions import Divisions, divide
from pyggml.passes.sharded import Builder
from pyggml.passes.stages import Shard, stages_of
from pyggml.passes.work import Work

#: The cuts that `shard=` knows, and what they divide.
CUTS = {
    "heads": "attentions by heads, with the products before and after them",
    "rows": "pairs of products: the first by rows, the second by columns; vocabularies",
    "experts": "products by expert id",
    "layers": "the graph into stages, one after another",
    "sequence": "the rows of caches; partial attentions are merged",
}


def shard(work: Work) -> Work:
    """The graph of all devices of `work.shard`, and the home of every node.

    Errors: GraphError if a cut that was asked for cannot be made.
    """
    plan = work.shard
    if plan is None:
        return work
    stages = stages_of(work, plan)
    groups = stages.groups

    def shares_of(node: Node) -> tuple[float, ...]:
        size = len(groups[node])
        return plan.shares if size == len(plan.shares) else (1.0,) * size

    divisions = divide(work.graph, plan.cuts, shares_of)
    _check(plan, divisions)
    mirrored: frozenset[Node] = frozenset()
    graph = None
    while graph is None:
        builder = Builder(work, stages.devices, groups, divisions, mirrored)
        graph = builder.graph()
        mirrored |= builder.conflicts
    used = tuple(dict.fromkeys((*work.backends, *stages.devices)))
    expanded = tuple(dict.fromkeys(builder.expanded))
    return replace(work, graph=graph, homes=builder.homes, backends=used, expanded=expanded)


def _check(plan: Shard, divisions: Divisions) -> None:
    """Errors: GraphError for a cut that divides nothing."""
    for cut, n in plan.cuts.items():
        if cut == "layers" or n == 1 or cut in divisions.used or not plan.strict:
            continue
        reason = divisions.reasons.get(cut, f"nothing in the graph is divided so ({CUTS[cut]})")
        raise GraphError(f"shard={{{cut!r}: {n}}}: {reason}")
