"""Which layer each node and step belongs to, and which layers are alike.

A layer's number is in ggml's labels: `blk.3.attn_q.weight`, `Qcur-3`, `cache_k_l3`. A node without
a label belongs to the first layer that reads it, or to a later one whose weights it reads. So the
norm at the start of a layer is part of that layer.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from pyggml.graph import users_of
from pyggml.node import Node, labels

#: Stands for the layer of what comes after all layers.
_AFTER = 1 << 30
#: Also in the name of a step, such as `mul_mat(blk.3.attn_q.weight)`.
_NUMBER = re.compile(r"(?<=blk\.)\d+(?=\.)|(?<=-)\d+(?=$|\))|(?<=_l)\d+(?=$|\))")


@dataclass(frozen=True, slots=True)
class Section:
    """Layers whose steps are alike, or the steps before, after or without layers.

    name    "layers", "input", "output" or "graph"
    layers  their numbers; empty for the others
    steps   for each layer, its steps in the order in which they run; one list for the others
    """

    name: str
    layers: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]


def number_in(label: str) -> int | None:
    """The layer's number in a label; None if there is none."""
    match = _NUMBER.search(label)
    return None if match is None else int(match[0])


def collapsed(label: str) -> str:
    """A label with `*` in place of the number of its layer."""
    return _NUMBER.sub("*", label)


def layers_of(nodes: Sequence[Node]) -> dict[Node, int | None]:
    """The layer of each node; None if it belongs to none. Sources must come before their users."""
    layers: dict[Node, int | None] = {}
    for node in nodes:
        if labels(node):
            layers[node] = _layer_in_labels(node)
        else:
            known = (layers.get(source) for source in node.src if source is not None)
            layers[node] = max((n for n in known if n is not None), default=None)
    users = users_of(nodes)
    for node in reversed(nodes):  # users come before their sources
        if not labels(node) and users.get(node):
            first = min(_AFTER if n is None else n for n in map(layers.get, users[node]))
            own = layers[node]
            layer = first if own is None else max(first, own)
            layers[node] = None if layer == _AFTER else layer
    return layers


def _layer_in_labels(node: Node) -> int | None:
    """The layer in the newest label that has one."""
    numbers = [number_in(text) for text in labels(node)]
    return next((n for n in reversed(numbers) if n is not None), None)


def layers_of_steps(results: Sequence[Node], layers: Mapping[Node, int | None]) -> list[int | None]:
    """The layer of each step, given their results in order.

    A step of no layer between two steps of layers, such as a mask, counts as part of the layer in
    which it runs.
    """
    numbers = [layers.get(node) for node in results]
    inside = [i for i, number in enumerate(numbers) if number is not None]
    for i in range(inside[0], inside[-1]) if inside else ():
        if numbers[i] is None:
            numbers[i] = numbers[i - 1]
    return numbers


def sections(numbers: Sequence[int | None], keys: Sequence[Hashable]) -> list[Section]:
    """The steps by layer, with layers that have equal keys together.

    numbers  the layer of each step
    keys     equal for steps that count as repetitions of each other
    """
    if all(number is None for number in numbers):
        return [Section("graph", (), (tuple(range(len(numbers))),))] if numbers else []
    by_layer: dict[int, list[int]] = {}
    first = next(i for i, number in enumerate(numbers) if number is not None)
    before = tuple(range(first))
    after = tuple(i for i, number in enumerate(numbers) if number is None and i > first)
    for i, number in enumerate(numbers):
        if number is not None:
            by_layer.setdefault(number, []).append(i)
    alike: dict[tuple[Hashable, ...], list[int]] = {}
    for number in sorted(by_layer):
        alike.setdefault(tuple(keys[i] for i in by_layer[number]), []).append(number)
    groups = [
        Section("layers", tuple(same), tuple(tuple(by_layer[n]) for n in same))
        for same in alike.values()
    ]
    ends = Section("input", (), (before,)), Section("output", (), (after,))
    return [section for section in (ends[0], *groups, ends[1]) if section.steps[0]]
