"""Steps bound to host memory: arrays made once, kernels called in order, loops piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import Address, BodyPlan, Step
from pyggml.backends.numpy.table import KERNELS, Array, Packed, Scratch
from pyggml.errors import PyggmlError
from pyggml.graph import Node, Spec, label_of, line_of
from pyggml.loop import Chain, Shift
from pyggml.transfer import origin

Call = Callable[[], None]


def array_at(at: Address, spec: Spec) -> Array:
    """The four-dimensional array (or Packed) at an address."""
    kind, ne, nb = spec.dtype, spec.ne, at.nb
    outer = (ne[3], ne[2], ne[1])
    steps = (nb[3], nb[2], nb[1])
    if kind.numpy is not None:
        return _strided((*outer, ne[0]), kind.numpy, at, (*steps, nb[0]))
    if kind.block == 1:
        return Packed(kind, _strided((*outer, ne[0]), np.uint16, at, (*steps, nb[0])), ne)
    shape = (*outer, ne[0] // kind.block, kind.nbytes)
    return Packed(kind, _strided(shape, np.uint8, at, (*steps, nb[0], 1)), ne)


def _strided(
    shape: tuple[int, ...], dtype: Any, at: Address, strides: tuple[int, ...]
) -> NDArray[Any]:
    made: NDArray[Any] = np.ndarray(shape, dtype, at.buffer, at.offset, strides)
    return made


class NumpyRunner:
    """A plan's steps with their arrays. `run` calls the kernels in order."""

    def __init__(
        self,
        steps: Sequence[Step],
        at: Mapping[Node, Address],
        scratch: NDArray[np.uint8],
        scratch_at: Sequence[int],
    ) -> None:
        self.steps = tuple(steps)
        self.at = at
        self._calls: list[Call] = []
        for step, offset in zip(self.steps, scratch_at):
            memory = scratch[offset : offset + step.scratch]
            if step.loop is not None:
                self._calls.append(_LoopCall(step, at, memory))
            else:
                arrays = [None if n is None else array_at(at[n], n.spec) for n in _operands(step)]
                self._calls.append(_kernel_call(step, arrays, memory, step.node.attrs))

    def run(self) -> None:
        """Execute every step in order."""
        index = 0
        try:
            with _manners():
                for index, call in enumerate(self._calls):  # noqa: B007
                    call()
        except Exception as error:
            raise _named(error, self.steps[index].node) from None

    def run_step(self, index: int) -> None:
        """Execute one step."""
        try:
            with _manners():
                self._calls[index]()
        except Exception as error:
            raise _named(error, self.steps[index].node) from None


@contextmanager
def _manners() -> Iterator[None]:
    """NumPy as kernels expect it: inf and NaN are values like others, and its own buffers, of which
    a ufunc over strided operands takes three, stay small."""
    with np.errstate(all="ignore"):  # restores the size of buffers too
        np.setbufsize(2048)
        yield


def _named(error: Exception, node: Node) -> Exception:
    """A kernel's complaint with the node and the line that built it; others get them as a note."""
    sources = ", ".join(label_of(origin(s)) for s in node.src if s is not None)
    what, where = f"{node.op.name}({sources})", f"at {line_of(node)}"
    if isinstance(error, PyggmlError):
        error.args = (f"{what}: {error}; {where}", *error.args[1:])
    else:
        error.add_note(f"in the kernel of {what}, {where}")
    return error


def _operands(step: Step) -> tuple[Node | None, ...]:
    return (step.node, *step.node.src)


def _kernel_call(
    step: Step, arrays: Sequence[Array | None], memory: NDArray[np.uint8], attrs: Mapping[str, Any]
) -> Call:
    row = KERNELS[step.node.op]
    if row.scratch is None:
        return lambda: row.run(*arrays, **attrs)
    return lambda: row.run(*arrays, scratch=Scratch(memory), **attrs)


class _LoopCall:
    """A loop node: its bodies' arrays that stay are made once, pieces of operands as they come."""

    def __init__(self, step: Step, at: Mapping[Node, Address], memory: NDArray[np.uint8]) -> None:
        assert step.loop is not None
        self.loop = step.loop
        self.node = step.node
        self.at = at
        self.bodies = {plan.body: _BoundBody(plan, memory) for plan in step.bodies}

    def __call__(self) -> None:
        for body, starts in self.loop.pieces():
            chains = [
                Chain(dim, axis, ())
                for dim, axis in enumerate(self.loop.fill)
                if isinstance(axis, int)
            ]
            out = _part(self.at[self.node], self.node, chains, starts)
            pieces = {body.out: out}
            if body.carry is not None:
                pieces[body.carry] = out
            for take in body.takes:
                source = self.node.src[take.source]
                assert source is not None
                pieces[take.piece] = _part(self.at[source], source, take.chains, starts)
            self.bodies[body].run(pieces, starts)


def _part(at: Address, node: Node, chains: Sequence[Chain], starts: Sequence[int]) -> Address:
    """The address of the piece that begins where `chains` lead from `starts`."""
    offset = at.offset
    for chain in chains:
        first = chain.at(starts[chain.dim])
        offset += (first // node.dtype.block if chain.axis == 0 else first) * at.nb[chain.axis]
    return Address(at.buffer, offset, at.nb)


class _BoundBody:
    def __init__(self, plan: BodyPlan, memory: NDArray[np.uint8]) -> None:
        self.plan = plan
        self.fixed: dict[Node, Array] = {}
        self.moving: list[Node] = []  # views of pieces, sources first
        for node, place in plan.places.items():
            if place.base is None:
                at = Address(memory, place.offset, place.nb)
                self.fixed[node] = array_at(at, node.spec)
            elif place.base is not node:
                self.moving.append(node)
        self.scratch = [
            memory[offset : offset + step.scratch]
            for step, offset in zip(plan.steps, plan.scratch_at)
        ]
        self.shifts: dict[Node, list[Shift]] = {}
        for shift in plan.body.shifts:
            self.shifts.setdefault(shift.node, []).append(shift)

    def run(self, pieces: dict[Node, Address], starts: Sequence[int]) -> None:
        for node in self.moving:
            source = node.src[0]
            assert source is not None and node.op.view is not None
            looked = node.op.view(node, pieces[source].nb)
            assert looked is not None
            at = pieces[source]
            pieces[node] = Address(at.buffer, at.offset + looked[0], looked[1])
        arrays = dict(self.fixed)
        for node, at in pieces.items():
            arrays[node] = array_at(at, node.spec)
        for step, memory in zip(self.plan.steps, self.scratch):
            attrs = dict(step.node.attrs)
            for shift in self.shifts.get(step.node, ()):
                attrs[shift.attr] += shift.per * shift.chain.at(starts[shift.chain.dim])
            operands = [None if n is None else arrays[n] for n in _operands(step)]
            _kernel_call(step, operands, memory, attrs)()
