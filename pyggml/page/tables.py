"""A plan's nodes, steps, splits and blocks as columns of numbers: the data of a page."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from pyggml.backends.base import Kernels
from pyggml.backends.step import LoopStep, Step, own_nodes
from pyggml.loop import loop_of
from pyggml.node import Node, label_of, labels, line_of
from pyggml.operation import cost_of
from pyggml.page.arena import blocks_of
from pyggml.page.names import Texts, lines_of, place_of_line, text_of_attributes
from pyggml.runtime.layers import Section, layers_of, layers_of_steps, sections
from pyggml.runtime.report import main_op, text_of
from pyggml.transfer import origin, transfer

if TYPE_CHECKING:
    from pyggml.runtime.plan import Plan

NODE_KEYS = ("name", "layer", "op", "type", "ne", "bytes", "place", "line", "attrs", "src", "base")


class Tables:
    """The columns of one plan.

    texts  the texts of the page, shared by its plans
    """

    def __init__(self, plan: Plan, texts: Texts) -> None:
        self.work, self.texts = plan._work, texts
        work = self.work
        self.steps = work.steps
        self.places = [backend.place for backend in dict.fromkeys(work.backends)]
        own = tuple(own_nodes(work.order, self.steps))
        self.nodes, self.own = (*work.order, *own), frozenset(own)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.layers = layers_of(self.nodes)
        self.kernels = plan.kernels()
        self._line = cache(lambda line: texts.add(place_of_line(line)))

    def node_columns(self) -> dict[str, list[Any]]:
        """One entry for each node. layer is -1 for none; base is -1 for the node itself."""
        rows = [self._node(node) for node in self.nodes]
        return {key: list(values) for key, values in zip(NODE_KEYS, zip(*rows))}

    def _node(self, node: Node) -> tuple[Any, ...]:
        texts, layer, base = self.texts, self.layers[node], node.base
        return (
            texts.add_name(label_of(node) if labels(node) else "", layer),
            -1 if layer is None else layer,
            texts.add(node.op.name),
            texts.add(node.dtype.name),
            texts.add(", ".join(map(str, node.ne[: node.spec.rank]))),
            self._nbytes(node),
            self.places.index(self.work.home(node).place),
            self._line(line_of(node) or line_of(origin(node))),
            self._attributes(node),
            [self.number[s] for s in node.src if s is not None and s in self.number],
            -1 if base is node else self.number.get(base, -1),
        )

    def _nbytes(self, node: Node) -> int:
        layout = self.work.layouts.get(node)
        return node.spec.nbytes if layout is None else layout.nbytes

    def step_columns(self, seconds: Sequence[float] | None) -> dict[str, list[Any]]:
        """One entry for each step. at is the offset in the arena, -1 for memory of a leaf."""
        placed = self.work.placed
        spots = [placed.spots[step.node] for step in self.steps]
        costs = [[cost_of(node) for node in step.nodes] for step in self.steps]
        number = self.number
        columns: dict[str, list[Any]] = {
            "node": [number[step.node] for step in self.steps],
            "op": [self.texts.add(main_op(step)) for step in self.steps],
            "nodes": [[number[n] for n in step.nodes] for step in self.steps],
            "reads": [[number[n] for n in dict.fromkeys(step.reads)] for step in self.steps],
            "split": [i for i, s in enumerate(self.work.splits) for _ in (*s.copies, *s.steps)],
            "kernels": [self.texts.add("\n".join(lines_of(k.names))) for k in self.kernels],
            "why": [self.texts.add(k.why) for k in self.kernels],
            "at": [-1 if spot.base is not None else spot.offset for spot in spots],
            "scratch": [step.scratch for step in self.steps],
            "flops": [round(sum(c.flops for c in cost)) for cost in costs],
            "traffic": [round(sum(c.nbytes for c in cost)) for cost in costs],
            "body": [self._body(step) for step in self.steps],
        }
        if seconds is not None:
            columns["seconds"] = [float(f"{time:.4g}") for time in seconds]
        return columns

    def split_rows(self) -> list[list[Any]]:
        """For each split: its place, the number of its copies and steps, what it waits for."""
        return [
            [self.places.index(s.backend.place), len(s.copies), len(s.steps), list(s.waits)]
            for s in self.work.splits
        ]

    def block_columns(self) -> dict[str, dict[str, list[Any]]]:
        """By device, one entry for each block; see `arena.Block`."""
        keys = ("offset", "nbytes", "start", "end", "kind")
        columns: dict[str, dict[str, list[Any]]] = {
            device: {key: [] for key in (*keys, "tensors")} for device in self.work.placed.arenas
        }
        for block in blocks_of(self.work):
            for key in keys:
                columns[block.device][key].append(getattr(block, key))
            tensors = [[step, self.number[node]] for step, node in block.tensors]
            columns[block.device]["tensors"].append(tensors)
        return columns

    def sections(self) -> list[Section]:
        """The steps by layer, layers with the same steps together."""
        numbers = layers_of_steps([step.node for step in self.steps], self.layers)
        readers: dict[Node, set[int | None]] = {}
        for step, layer in zip(self.steps, numbers):
            for read in step.reads:
                readers.setdefault(read.base, set()).add(layer)
        shared = {n for n, layers in readers.items() if len(layers - {self.layers.get(n)}) > 1}
        keys = [self._key(s, k, shared) for s, k in zip(self.steps, self.kernels)]
        return sections(numbers, keys)

    def _key(self, step: Step, kernels: Kernels, shared: Collection[Node]) -> Hashable:
        """Equal for steps of different layers that do the same.

        shared  tensors that several layers read besides the one that computes them
        """
        home, own = self.work.home, self.layers[step.node]
        return (
            home(step.node).place,
            home(origin(step.node)).place,
            tuple((n.op, n.spec, self._name(n), self._attributes(n)) for n in step.nodes),
            tuple(self._read_key(read, own, shared) for read in step.reads),
            step.scratch,
            kernels,
            self._body(step),
        )

    def _read_key(self, read: Node, layer: int | None, shared: Collection[Node]) -> Hashable:
        """What another layer hands on may have any name: the first layer reads the embeddings. What
        several layers read, such as a mask, must be the same."""
        base = read.base
        if base in shared and not base.op.leaf:
            return read.spec, self.number[base]
        own = self.layers.get(read) == layer or base.op.leaf
        return read.spec, base.op.leaf, self._name(read) if own else -1

    def _body(self, step: Step) -> int:
        """The steps of one piece of a loop, one a line."""
        if not isinstance(step, LoopStep):
            return 0
        lines = (f"{text_of(inner)}: {inner.node.spec}" for inner in step.bodies[-1].steps)
        return self.texts.add_name("\n".join(lines), self.layers.get(step.node))

    def _attributes(self, node: Node) -> int:
        """Those that a user gave, and how a loop is cut."""
        loop = loop_of(node)
        if loop is not None:
            return self.texts.add(str(loop))
        hidden = node.op is transfer or node.op.leaf or node in self.own
        return 0 if hidden else self.texts.add(text_of_attributes(node.attrs))

    def _name(self, node: Node) -> int:
        return self.texts.add_name(label_of(node), self.layers.get(node))
