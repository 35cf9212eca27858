"""The kernel table of a backend: which function computes which op, and what the planner must know.

A backend keeps one `KernelTable` in its `table.py`; the files of its families register themselves
there. What a function is called with is the backend's own business, and stands in that file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, TypeVar

from pyggml.backends.base import Step
from pyggml.node import Node, Op

F = TypeVar("F", bound=Callable[..., Any])
K = TypeVar("K", bound="Kernel")
S = TypeVar("S", bound=Step)


def never(node: Node) -> None:
    """Refuses no node."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One row of the table. Backends add fields in a subclass.

    run      the function
    types    element types of operands and result that it takes; None for all
    inplace  operands whose memory the result may take over
    scratch  bytes that it needs besides its operands, from the node; None: it never needs any
    refuses  why it does not run a node of these types, as a phrase; None where it does
    numeric  the class of its numbers (see `Backend.numeric`), from the node
    """

    run: Callable[..., Any]
    types: frozenset[str] | None
    inplace: tuple[str, ...]
    scratch: Callable[[Node], int] | None
    refuses: Callable[[Node], str | None]
    numeric: Callable[[Node], str]


class KernelTable(dict[Op[Any], K]):
    """The kernels of a backend by their ops.

    row      the class of its rows
    types    what a kernel takes that says nothing else
    refuses  why no kernel of the backend runs a node, as a phrase; None where one may
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

        The keywords are the fields of `Kernel`, and those that the backend's rows have besides;
        `numeric` may be the class itself.

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
        """None where a kernel here runs `node`, else the reason why not, as a phrase."""
        row = self.get(node.op)
        if row is None:
            return self._absent(node.op)
        return _wrong_type(node, row.types) or self._refuses(node) or row.refuses(node)

    def _absent(self, op: Op[Any]) -> str:
        """That there is no kernel for `op`, and whose kernel might be mistaken for it: an op of the
        user's may have the name of one in the library.
        """
        for other in self:
            if other.name == op.name:
                return (
                    f"no kernel for {op.name} of {op.__module__}; the kernel here is for another "
                    f"op, {other.name} of {other.__module__}"
                )
        return f"no kernel for {op.name}"

    def numeric(self, node: Node) -> str:
        """The class of the numbers of `node` here."""
        return self[node.op].numeric(node)

    def step(self, node: Node, make: Callable[..., S], **fields: Any) -> S:
        """The step that computes `node` alone: a `make`, with further fields of its own."""
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
    """Why a kernel that takes these element types (None: all) does not take the node's."""
    for tensor in (node, *node.src):
        if types is not None and tensor is not None and tensor.dtype.name not in types:
            return f"{node.op.name} does not take {tensor.dtype}"
    return None
