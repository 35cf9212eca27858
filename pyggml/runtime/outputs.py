"""A plan's outputs: which of them a run returns, and how they get to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias

from pyggml.backends.base import Backend, Download
from pyggml.backends.step import Address
from pyggml.errors import DeviceError, DTypeError, UnknownNameError
from pyggml.node import Node
from pyggml.ops.leaf import constant_op, data_of
from pyggml.passes.work import Work
from pyggml.quants import decode_rows
from pyggml.runtime.exchange import Exchange

#: Waits for an output and returns the caller's copy.
Output: TypeAlias = Callable[[], Any]


class Outputs:
    """The outputs of a plan at their addresses. Each download is prepared once.

    exchange  sends those of this rank to the others, and receives theirs; None without ranks
    """

    def __init__(
        self, work: Work, at: Mapping[Node, Address], exchange: Exchange | None = None
    ) -> None:
        self._work, self._at, self._exchange = work, at, exchange
        self._nodes = work.graph.outputs
        self._downloads: dict[str, Download] = {}

    def collect(self, names: Iterable[str]) -> dict[str, Output]:
        """Queue copies of these outputs; bf16 and block types become f32."""
        return {name: self._collected(name) for name in names}

    def _collected(self, name: str) -> Output:
        node = self._nodes[name]
        if node.op is constant_op:  # on the device it may have another layout
            return partial(_decoded, node, data_of(node).copy)
        arrival = self._download(name, node)
        if self._exchange is not None:
            number = list(self._nodes).index(name)
            arrival = self._exchange.output(number, node, arrival)
        assert arrival is not None
        return arrival if node.dtype.numpy is not None else partial(_decoded, node, arrival)

    def _download(self, name: str, node: Node) -> Output | None:
        """Queue the copy of an output to the host; None if it is another rank's."""
        backend = self._work.home(node)
        if not self._is_here(backend):
            return None
        return self._prepared(name, node)()

    def _prepared(self, name: str, node: Node) -> Download:
        download = self._downloads.get(name)
        if download is None:
            backend = self._work.home(node)
            download = self._downloads[name] = backend.downloads(self._at[node], node.spec)
        return download

    def downloads(self, names: Iterable[str]) -> list[Download] | None:
        """Downloads that return the caller's copies; None if some need more than that."""
        nodes = {name: self._nodes[name] for name in names}
        if any(node.op is constant_op or node.dtype.numpy is None for node in nodes.values()):
            return None
        return [self._prepared(name, node) for name, node in nodes.items()]

    def _is_here(self, backend: Backend) -> bool:
        return self._exchange is None or self._exchange.owns(backend)

    def homes(self, names: Iterable[str]) -> set[Backend]:
        """The backends that queue the copies of these outputs."""
        nodes = [self._nodes[name] for name in names]
        return {self._work.home(node) for node in nodes if node.op is not constant_op}

    def view(self, name: str) -> Any:
        """A view of an output's memory, as it is stored."""
        node = self._nodes[name]
        if node.op is constant_op:
            return data_of(node).view()
        if not self._is_here(self._work.home(node)):
            raise DeviceError(
                f"views(): {name!r} is on {self._work.home(node).place}, in another process; run() "
                "returns copies in all of them"
            )
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
