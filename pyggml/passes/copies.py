"""Free nodes move to the devices where the fewest bytes are copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyggml.backends.base import Backend
from pyggml.graph import Graph, Users
from pyggml.node import Node
from pyggml.ops.views import bases

#: Walks over the graph in search of better devices; one is mostly enough.
WALKS = 4


def fewer_copies(
    backends: Sequence[Backend],
    graph: Graph,
    homes: Mapping[Node, Backend],
    free: Mapping[Node, Backend],
) -> dict[Node, Backend]:
    """The homes after free nodes have moved.

    free  the nodes that only the last rule placed, with the device it chose. A node moves only
          between this device, the preferred one and those of its neighbours that are not free
    """
    homes = dict(homes)
    users: dict[Node, list[Node]] = {node: [] for node in homes}
    for node in graph.nodes:
        if node in homes and not node.op.leaf:
            for base in bases(node):
                if base in users:
                    users[base].append(node)
    rank = {backend: i for i, backend in enumerate(backends)}
    order = [node for node in graph.nodes if node in free]
    for walk in range(WALKS):
        moved = False
        for node in order[:: -1 if walk % 2 else 1]:
            neighbours = [*users[node], *(base for base in bases(node) if base in homes)]
            fixed = (homes[n] for n in neighbours if n not in free)
            devices = {homes[node], free[node], backends[0], *fixed}
            best = min(devices, key=lambda d: (_copied(node, d, homes, users), rank[d]))
            if best is not homes[node] and best.supports(node) is None:
                homes[node], moved = best, True
        if not moved:
            break
    return homes


def _copied(
    node: Node, device: Backend, homes: Mapping[Node, Backend], users: Users
) -> tuple[int, int]:
    """The bytes that are copied if `node` runs on `device`, and the number of copies."""
    total = count = 0
    for base in dict.fromkeys(bases(node)):
        far = base in homes and homes[base].device != device.device and not base.op.leaf
        others = (user for user in users.get(base, ()) if user is not node)
        if far and not any(homes[user].device == device.device for user in others):
            total += base.spec.nbytes
            count += 1
    readers = {homes[user].device for user in users[node]} - {device.device}
    return total + len(readers) * node.spec.nbytes, count + len(readers)
