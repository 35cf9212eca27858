"""A plan's outputs: which of them a run returns, and how they get to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias

from pyggml.backends.base import Backend, Download
from pyggml.backends.step import Address
from pyggml.errors import DTypeError, UnknownNameError
from pyggml.node import Node
from pyggml.ops.leaf import constant_op, data_of
from pyggml.passes.work import Work
from pyggml.quants import decode_rows

#: Waits for an output and returns the caller's copy.
Output: TypeAlias = Callable[[], Any]


class Outputs:
    """The outputs of a plan at their addresses. Each download is prepared once."""

    def __init__(self, work: Work, at: Mapping[Node, Address]) -> None:
        self._work, self._at = work, at
        self._nodes = work.graph.outputs
        self._downloads: dict[str, Download] = {}

    def collect(self, names: Iterable[str]) -> dict[str, Output]:
        """Queue copies of these outputs; bf16 and block types become f32."""
        return {name: self._collected(name) for name in names}

    def _collected(self, name: str) -> Output:
        node = self._nodes[name]
        if node.op is constant_op:  # on the device it may have another layout
            return partial(_decoded, node, data_of(node).copy)
        download = self._downloads.get(name)
        if download is None:
            backend = self._work.home(node)
            download = self._downloads[name] = backend.downloads(self._at[node], node.spec)
        arrival = download()
        return arrival if node.dtype.numpy is not None else partial(_decoded, node, arrival)

    def homes(self, names: Iterable[str]) -> set[Backend]:
        """The backends that queue the copies of these outputs."""
        nodes = [self._nodes[name] for name in names]
        return {self._work.home(node) for node in nodes if node.op is not constant_op}

    def view(self, name: str) -> Any:
        """A view of an output's memory, as it is stored."""
        node = self._nodes[name]
        if node.op is constant_op:
            return data_of(node).view()
        return self._work.home(node).view(self._at[node], node.spec)


def _decoded(node: Node, rows: Output) -> Any:
    return rows() if node.dtype.numpy is not None else decode_rows(node.dtype, rows())


def names_of(outputs: Iterable[str] | None, graph_outputs: Mapping[str, Node]) -> tuple[str, ...]:
    """The names that `outputs=` asks for; None: all.

    Errors: DTypeError unless it is a list of names, UnknownNameError for a name of no output.
    """
    if outputs is None:
        return tuple(graph_outputs)
    if isinstance(outputs, str) or not isinstance(outputs, Iterable):
        raise DTypeError(f"outputs must be a list of names such as ['logits'], not {outputs!r}")
    names = tuple(outputs)
    for name in names:
        if name not in graph_outputs:
            known = ", ".join(graph_outputs) or "none"
            raise UnknownNameError(f"the plan has no output {name!r}; its outputs are: {known}")
    return names
