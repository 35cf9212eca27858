"""The kernel table of the cpu backend.

A function here does not compute. When a plan is bound, it is called once as `fn(call)` and adds
native kernels with their arguments to the program:

    @kernel(ops.rms_norm)
    def rms_norm(call: Call) -> None:
        call.add(ROWS, call.out.ptr, call["a"].ptr, ..., work=call.out.elements)

Operands may have any strides, and must be read as they are: the program runs many times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.native.program import Program
from pyggml.backends.host_memory import address_of
from pyggml.backends.step import Address, Step
from pyggml.backends.table import Kernel, KernelTable
from pyggml.node import Node
from pyggml.spec import Ne

KERNELS = KernelTable(Kernel, {"f32"})
kernel = KERNELS.kernel


class CpuStep(Step):
    """A step that a native kernel runs."""

    __slots__ = ()


#: The work that one thread does in the time of a few meetings.
FEW = 8192


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor in memory: the address of its first element, its type name, sizes and strides."""

    ptr: int
    type: str
    ne: Ne
    nb: Ne
    layout: str

    @property
    def elements(self) -> int:
        n0, n1, n2, n3 = self.ne
        return n0 * n1 * n2 * n3

    @classmethod
    def at(cls, address: Address, node: Node) -> Operand:
        ptr = address_of(address.buffer) + address.offset
        return cls(ptr, node.dtype.name, node.ne, address.nb, address.layout)


class Call:
    """A step that is being bound: its operands, and the program that it adds to."""

    def __init__(
        self,
        program: Program,
        node: Node,
        at: Mapping[Node, Address],
        scratch: int,
        attrs: Mapping[str, Any],
    ) -> None:
        self.node, self.attrs, self._program, self._at = node, attrs, program, at
        self.scratch = scratch
        self.keep: list[Any] = []
        self.out = Operand.at(at[node], node)

    def __getitem__(self, name: str) -> Operand:
        return Operand.at(self._at[self.node[name]], self.node[name])

    def get(self, name: str) -> Operand | None:
        """An optional operand; None if it is absent."""
        node = self.node.get(name)
        return None if node is None else Operand.at(self._at[node], node)

    def root(self, name: str) -> Operand:
        """The leaf that an operand is, or is a view of."""
        root = self.node[name].root
        return Operand.at(self._at[root], root)

    def add(
        self,
        native: Native,
        *values: int | float,
        work: int | None = None,
        reads: tuple[int, int] = (0, 0),
    ) -> None:
        """Add a kernel with the values of its parameters.

        work   about how many numbers it computes, those that take long counted several times. If
               they are few, one thread runs it alone, as always if `work` is 0; None: all run it
        reads  the address and bytes of weights, which threads that wait for earlier calls fetch
        """
        self._program.add(native, *values, alone=work is not None and work <= FEW, reads=reads)
