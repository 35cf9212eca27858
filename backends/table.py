"""The kernel table of a backend: the function that computes each op, and its facts for the planner.

Each backend has one `KernelTable` in its `table.py`, where the files of its op families register
their kernels. That file also documents how the backend calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from types import EllipsisType
from typing import Any, TypeVar

from pyggml.backends.step import Step
from pyggml.node import Node
from pyggml.operation import Op

F = TypeVar("F", bound=Callable[..., Any])
K = TypeVar("K", bound="Kernel")
S = TypeVar("S", bound=Step)


def never(node: Node) -> None:
    """Refuse no node."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One row of the table. Backends add fields in a subclass.

    run      the function
    types    the element types it accepts for operands and result; None for all
    inplace  operands whose memory the result may take over
    scratch  returns the bytes it needs for a node besides operands; None: it never needs any
    refuses  returns why it cannot run a node of these types, as a phrase; None if it can
    numeric  returns the precision class of a node (see `Backend.numeric`)
    """

    run: Callable[..., Any]
    types: frozenset[str] | None
    inplace: tuple[str, ...]
    scratch: Callable[[Node], int] | None
    refuses: Callable[[Node], str | None]
    numeric: Callable[[Node], str]

    @property
    def name(self) -> str:
        """The name of the function, for people."""
        function = self.run
        while isinstance(function, partial):
            function = function.func
        return str(getattr(function, "__name__", type(function).__name__)).strip("_")


class KernelTable(dict[Op[Any], K]):
    """The kernels of a backend by op.

    row      the class of its rows
    types    the types of kernels that do not name any
    refuses  returns why no kernel of the backend can run a node, as a phrase; None if one may
    """

    def __init__(
        self,
        row: type[K],
        types: Collection[str],
        refuses: Callable[[Node], str | None] = never,
    ) -> None:
        super().__init__()
        self._row = row
        self._types = frozenset(types)
        self._refuses = refuses

    def kernel(
        self,
        op: Op[Any],
        *,
        types: Collection[str] | EllipsisType | None = ...,
        inplace: tuple[str, ...] = (),
        scratch: Callable[[Node], int] | None = None,
        refuses: Callable[[Node], str | None] = never,
        numeric: str | Callable[[Node], str] = "f32",
        **fields: Any,
    ) -> Callable[[F], F]:
        """Decorator: register the function as the backend's kernel of `op`.

        The keywords are the fields of `Kernel` and any fields the backend's rows add; `numeric` may
        be the class itself.

            @kernel(ops.scale, inplace=("a",))
            def scale(out, a, *, s, b): ...
        """
        allowed = self._types if types is ... else None if types is None else frozenset(types)
        for operand in inplace:
            op.index(operand)  # UnknownNameError

        def class_of(node: Node) -> str:
            return numeric if isinstance(numeric, str) else numeric(node)

        def register(function: F) -> F:
            self[op] = self._row(function, allowed, inplace, scratch, refuses, class_of, **fields)
            return function

        return register

    def refusal(self, node: Node) -> str | None:
        """None if a kernel here runs `node`, else the reason as a phrase."""
        row = self.get(node.op)
        if row is None:
            return self._absent(node.op)
        return _wrong_type(node, row.types) or self._refuses(node) or row.refuses(node)

    def _absent(self, op: Op[Any]) -> str:
        """The refusal of an op without a kernel. It names a different op of the same name that has
        one: a user's op may be named like one of the library.
        """
        for other in self:
            if other.name == op.name:
                return (
                    f"no kernel for {op.name} of {op.__module__}; the kernel here is for another "
                    f"op, {other.name} of {other.__module__}"
                )
        return f"no kernel for {op.name}"

    def numeric(self, node: Node) -> str:
        """The precision class in which this backend computes `node`."""
        return self[node.op].numeric(node)

    def step(self, node: Node, make: Callable[..., S], **fields: Any) -> S:
        """The step that computes `node` alone, built by `make` with additional fields."""
        row = self[node.op]
        inplace = (node.get(operand) for operand in row.inplace)
        return make(
            node,
            (node,),
            tuple(s for s in node.src if s is not None),
            scratch=row.scratch(node) if row.scratch is not None else 0,
            inplace=tuple(s for s in inplace if s is not None),
            **fields,
        )


def _wrong_type(node: Node, types: Collection[str] | None) -> str | None:
    """Why a kernel for these element types (None: all) cannot take the node's; None if it can."""
    for tensor in (node, *node.src):
        if types is not None and tensor is not None and tensor.dtype.name not in types:
            return f"{node.op.name} does not take {tensor.dtype}"
    return None
