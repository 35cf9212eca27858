"""Weights of the host that a device reads ahead: while it computes, the weights of the next product
cross the bus.

The load of a product's weights comes before the product that borrows before it, so the weights of
two such products are in the arena at the same time. Both places are right before a product, where
`lower` divides the steps anyway, so reading ahead costs no fusion. The design that lost: a load
right behind the product before the last. It could begin sooner, but attention, which comes between
the experts of two layers, would have the weights of two products beside its scores, and the bus is
as busy: it is the slower one.

Experts that no token chose need not be sent, but that is known only once the ids are. So few tokens
are better off without reading ahead (`FEW`), unless the ids are known already, as those of the down
product are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from pyggml.backends.step import LoadStep, Step
from pyggml.node import Node
from pyggml.ops.leaf import constant_op
from pyggml.ops.linear import expected_share, expert_ids
from pyggml.ops.views import bases
from pyggml.passes.work import Work
from pyggml.transfer import is_resident, origin, transfer

#: With more unused experts than this share, their bytes take longer than all that a device computes
#: meanwhile. In DeepSeek-V2-Lite with an H100, a layer of 128 tokens computes for about 0.25 ms and
#: reads up and gate for 3.8.
FEW = 1 / 16

Loads = Mapping[Node, Sequence[Node]]


def is_borrowed(node: Node) -> bool:
    """Whether the node is a weight that a device loads in every run."""
    return node.op is transfer and not is_resident(node) and origin(node).op is constant_op


def borrowed(step: Node) -> list[Node]:
    """The weights that a step reads and its device loads in every run."""
    return [base for base in dict.fromkeys(bases(step)) if is_borrowed(base)]


def reads_ahead(work: Work) -> bool:
    """Whether devices load weights early. With parts of a graph on several devices they do not."""
    return work.read_ahead and work.shard is None


def loads_ahead(work: Work, sequence: Sequence[Node], ends: Collection[Node]) -> Loads:
    """Step -> the weights that its device begins to load before it, for a later step.

    sequence  the steps of all devices in order
    ends      steps behind which a split ends, even if the next step is on the same device
    """
    loads: dict[Node, list[Node]] = {}
    loaded: set[Node] = set()
    for stretch in _stretches(work, sequence, ends):
        place = {step: i for i, step in enumerate(stretch)}
        earlier = stretch[0]  # and from then on, the last step that borrows
        for step in stretch:
            weights = [weight for weight in borrowed(step) if weight not in loaded]
            if not weights:
                continue
            loaded.update(weights)
            ids = expert_ids(step)
            are_known = ids is not None and place.get(ids.base, -1) < place[earlier]
            if step is not earlier and (are_known or 1 - expected_share(step) <= FEW):
                loads.setdefault(earlier, []).extend(weights)
            earlier = step
    return loads


def _stretches(
    work: Work, sequence: Sequence[Node], ends: Collection[Node]
) -> Iterator[Sequence[Node]]:
    """The steps of each split."""
    stretch: list[Node] = []
    for step in sequence:
        if stretch and (work.home(step) is not work.home(stretch[-1]) or stretch[-1] in ends):
            yield stretch
            stretch = []
        stretch.append(step)
    if stretch:
        yield stretch


def bytes_ahead(steps: Sequence[Step]) -> int:
    """The most bytes of weights that are in memory ahead: before a step that does not read them."""
    alive: dict[Node, int] = {}
    most = 0
    for step in steps:
        if isinstance(step, LoadStep):
            alive |= {step.node: step.nbytes} if step.ahead else {}
            continue
        for read in step.reads:
            alive.pop(read.base, None)
        most = max(most, sum(alive.values()))
    return most
