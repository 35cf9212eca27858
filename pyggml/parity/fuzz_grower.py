"""A random graph under construction: leaves, and single ops on earlier results."""

from __future__ import annotations

from typing import Any

from pyggml.errors import PyggmlError
from pyggml.node import Node
from pyggml.ops.rules import repeats_into
from pyggml.parity.case import Source
from pyggml.parity.fuzz_draw import Draw
from pyggml.parity.graph_case import Builder, Statement

#: Later ops read the result of a single op only up to this many elements.
MOST = 4096


class Refused(Exception):
    """The op's rule refuses these sources."""


class Grower:
    """A graph under construction.

    results  names of tensors that later ops may read
    handles  state -> its newest handle
    """

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.builder = Builder()
        self.results: list[str] = []
        self.handles: dict[str, str] = {}

    def node(self, name: str) -> Node:
        return self.builder.nodes[name]

    def _add(self, prefix: str, op: str, *args: str | None, **attrs: Any) -> str:
        name = f"{prefix}{len(self.builder.statements)}"
        while args and args[-1] is None:
            args = args[:-1]
        try:
            self.builder.add(Statement(name, op, args, attrs))
        except PyggmlError:
            raise Refused from None
        return name

    def op(self, op: str, *args: str | None, **attrs: Any) -> str:
        return self._add("n", op, *args, **attrs)

    def _leaf(self, prefix: str, op: str, source: Source) -> str:
        name = f"{prefix}{len(self.builder.statements)}"
        self.builder.add(Statement(name, op, source=source))
        return name

    # -- leaves -----------------------------------------------------------------------------

    def leaf(self, type: str, ne: tuple[int, ...], fill: str = "") -> str:
        """An input, sometimes with strides."""
        layout = self.draw.pick(("", "", "", "wide", "inner")) if type == "f32" else ""
        return self._leaf("x", "", Source(type, ne, fill, False, layout))

    def ids(self, ne: tuple[int, ...], below: int) -> str:
        return self._leaf("i", "", Source("i32", ne, f"<{below}"))

    def weight(self, ne: tuple[int, ...], type: str = "f32") -> str:
        return self._leaf("w", "", Source(type, ne, "", True))

    def state(self, type: str, ne: tuple[int, ...], share: float = 0.3) -> str:
        """A new state, or with probability `share` an existing one of the same type and size."""
        spec = (type, (*ne, 1, 1, 1)[:4])
        same = [s for s in self.handles if (self.node(s).dtype.name, self.node(s).ne) == spec]
        if same and self.draw.chance(share):
            return self.draw.pick(same)
        name = self._leaf("s", "state", Source(type, ne))
        self.handles[name] = name
        return name

    def handle(self, state: str) -> str:
        """The newest handle of a state, or now and then the state before all writes."""
        return state if self.draw.chance(0.1) else self.handles[state]

    def wrote(self, state: str, write: str, handle: str | None = None) -> str:
        self.handles[state] = handle or write
        return self.handles[state]

    def write_rows(self, state: str) -> str:
        """Write an input into some rows of a two-dimensional state; return the new handle."""
        n, rows, *_ = self.node(state).ne
        count = self.draw.rng.randint(1, min(rows, 9))
        ids = self._leaf("i", "", Source("i32", (count,), f"!{rows}"))
        value = self.leaf("f32", (n, count))
        return self.wrote(state, self.op("set_rows", self.handles[state], value, ids))

    # -- single ops -------------------------------------------------------------------------

    def step(self) -> None:
        """Add an op on one of the latest results."""
        a = self.draw.pick(self.results[-8:])
        kinds = ("unary", "unary", "binary", "view", "permute", "reshape", "concat", "repeat",
                 "product", "scale", "norm", "cast", "rows", "write", "write", "part")  # fmt: skip
        name = getattr(self, f"_{self.draw.pick(kinds)}")(a)
        if name is not None and self.node(name).spec.elements <= MOST:
            self.results.append(name)

    def as_f32(self, a: str) -> str:
        return a if self.node(a).dtype.name == "f32" else self.op("cast", a, dtype="f32")

    def _unary(self, a: str) -> str:
        kinds = ("relu", "tanh", "silu", "sigmoid", "gelu", "softplus", "cont", "sum_rows",
                 "soft_max_ext")  # fmt: skip
        return self.op(self.draw.pick(kinds), self.as_f32(a))

    def _scale(self, a: str) -> str:
        return self.op("scale", self.as_f32(a), s=0.5, b=0.25)

    def _norm(self, a: str) -> str:
        return self.op(self.draw.pick(("norm", "rms_norm")), self.as_f32(a), eps=0.1)

    def _cast(self, a: str) -> str:
        narrow = self.op("cast", a, dtype=self.draw.pick(("f16", "bf16")))
        return self.op("cast", narrow, dtype="f32")

    def _binary(self, a: str) -> str:
        a = self.as_f32(a)
        fits = [b for b in self.results if repeats_into(self.node(b).ne, self.node(a).ne)]
        fits = [b for b in fits if self.node(b).dtype.name == "f32"]
        return self.op(self.draw.pick(("add", "sub", "mul")), a, self.draw.pick(fits or [a]))

    def _view(self, a: str) -> str:
        rng = self.draw.rng
        ne, start, step = [], [], []
        for size in self.node(a).ne:
            start.append(rng.randrange(size))
            step.append(self.draw.pick((1, 1, 2)))
            ne.append(rng.randint(1, 1 + (size - 1 - start[-1]) // step[-1]))
        return self.op("view", a, ne=tuple(ne), start=tuple(start), step=tuple(step))

    def _permute(self, a: str) -> str:
        axes = [0, 1, 2, 3]
        self.draw.rng.shuffle(axes)
        return self.op("permute", a, axes=tuple(axes))

    def _reshape(self, a: str) -> str:
        n = self.node(a).spec.elements
        first = self.draw.divisor(n)
        a = a if self.node(a).contiguous else self.op("cont", a)
        return self.op("reshape", a, ne=(first, n // first))

    def _concat(self, a: str) -> str:
        dim, first = self.draw.rng.randrange(4), self.node(a)
        fits = [
            b
            for b in self.results
            if self.node(b).dtype == first.dtype
            and all(self.node(b).ne[i] == first.ne[i] for i in range(4) if i != dim)
        ]
        return self.op("concat", a, self.draw.pick(fits), dim=dim)

    def _repeat(self, a: str) -> str:
        return self.op(
            "repeat", a, ne=tuple(n * self.draw.pick((1, 1, 2)) for n in self.node(a).ne)
        )

    def _product(self, a: str) -> str:
        a, k = self.as_f32(a), self.node(a).ne[0]
        kind = "q8_0" if k % 32 == 0 and self.draw.chance(0.3) else self.draw.pick(("f32", "f16"))
        return self.op("mul_mat", self.weight((k, self.draw.size(20)), kind), a)

    def _rows(self, a: str) -> str:
        ne = self.node(a).ne
        return self.op("get_rows", a, self.ids((self.draw.size(7), *ne[2:]), ne[1]))

    def _write(self, a: str) -> str | None:
        """Write a row of a result into a state, through its newest handle."""
        a = self.as_f32(a)
        n = self.node(a).ne[0]
        kind = self.draw.pick(("f32", "f16"))
        state = self.state(kind, (n, 6), share=0.7)
        row = self.op("view", a, ne=(n, 1, 1, 1), start=(0, 0, 0, 0), step=(1, 1, 1, 1))
        ids = self._leaf("i", "", Source("i32", (1,), "!6"))
        return self.wrote(state, self.op("set_rows", self.handles[state], row, ids))

    def _part(self, a: str) -> str | None:
        """Fill part of a state with one value; later ops read the whole state."""
        states = [s for s in self.handles if self.node(s).dtype.name in ("f32", "f16")]
        if not states:
            return None
        state = self.draw.pick(states)
        part = self._view(self.handles[state])
        zero = (0, 0, 0, 0)
        first = self.op("view", self.as_f32(a), ne=(1, 1, 1, 1), start=zero, step=(1, 1, 1, 1))
        write = self.op("cpy", self.op("repeat", first, ne=self.node(part).ne), part)
        return self.wrote(state, write, self.op("state_of", write))
