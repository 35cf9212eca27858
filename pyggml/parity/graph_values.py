"""A graph's values in float64, statement by statement, without a planner or a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.node import Node
from pyggml.parity import oracle
from pyggml.parity.case import MOVES
from pyggml.parity.graph_case import Builder, PlanText, Statement
from pyggml.parity.values import Array, decoded
from pyggml.quants import encode_rows

VIEWS = {"view", "permute", "transpose", "reshape"}
#: Ops whose kernels compute nothing, so that their results have no noise from rounding.
EXACT = {*MOVES, "set_rows", "cpy", "state_of", "relu"}
#: Ops whose results are sums of products, or products of such sums.
SUMS = {
    "mul_mat", "mul_mat_id", "fused_up_gate", "moe_up_gate", "flash_attn_ext", "lightning_indexer",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Value:
    """The value of a statement.

    content  of a handle: the whole state, flat, as this handle sees it
    index    of a handle: which elements of `content` the value is
    """

    array: Array
    content: Array | None = None
    index: Array | None = None


class Evaluation:
    """Values of all statements in one run.

    noise  op name -> relative error, drawn at random for every value that the op computes, as if a
           kernel had rounded it
    """

    def __init__(
        self,
        builder: Builder,
        states: Mapping[str, Array],
        noise: Mapping[str, float],
        seed: int,
    ) -> None:
        self.nodes, self.noise = builder.nodes, noise
        self.rng = np.random.default_rng(seed)
        self.values: dict[str, Value] = {}
        with np.errstate(all="ignore"):
            for statement in builder.statements:
                known = states.get(statement.name, builder.values.get(statement.name))
                self.values[statement.name] = self._value(statement, known)

    def _value(self, statement: Statement, known: Array | None) -> Value:
        if known is not None:
            if statement.op != "state":
                return Value(known)
            return Value(known, known.reshape(-1), np.arange(known.size).reshape(known.shape))
        node = self.nodes[statement.name]
        sources = [self.values[arg] if arg else None for arg in statement.args]
        if statement.op == "chain":
            return self._chained(statement, sources[0])
        if statement.op in ("set_rows", "cpy"):
            return self._written(statement, sources, node)
        if statement.op == "state_of":
            source = sources[0]
            assert source is not None and source.content is not None
            shape = node.root.ne[::-1]
            index = np.arange(source.content.size).reshape(shape)
            return Value(source.content.reshape(shape), source.content, index)
        array = oracle.run(statement.op, _arrays(sources), **statement.attrs)
        if statement.op in VIEWS and sources[0] is not None:
            first = sources[0]
            if first.index is None:
                return Value(array)
            index = oracle.run(statement.op, [first.index], **statement.attrs)
            return Value(array, first.content, index)
        if array.dtype.kind == "f" and statement.op not in EXACT:
            array = self._noisy(statement.op, array)
        return Value(rounded(node, array))

    def _noisy(self, op: str, array: Array, times: int = 1) -> Array:
        """The array with the noise of `times` such ops in a row.

        A sum of products may be small because its terms cancel, but rounding them still leaves an
        error of their size. So the noise of these ops is at least relative to the whole row.
        """
        noise = times**0.5 * self.noise.get(op, 0.0)
        if not noise:
            return array
        size = np.abs(array)
        if op in SUMS:
            squares = np.where(np.isfinite(size), size, 0.0) ** 2
            size = np.maximum(size, np.sqrt(squares.mean(axis=-1, keepdims=True)))
        noisy: Array = array + noise * size * self.rng.uniform(-1, 1, array.shape)
        return noisy

    def _chained(self, statement: Statement, first: Value | None) -> Value:
        assert first is not None
        times, of = statement.attrs["times"], statement.attrs["of"]
        if of == "view":
            return first
        array = first.array
        for _ in range(times):
            array = array + first.array if of == "add" else array + 0.001
            array = np.maximum(array, 0) if of == "relu" else array
        return Value(self._noisy("add" if of == "add" else "scale", array, times))

    def _written(self, statement: Statement, sources: Sequence[Value | None], node: Node) -> Value:
        target = sources[node.op.writes or 0]
        assert target is not None and target.content is not None and target.index is not None
        array = oracle.run(statement.op, _arrays(sources), **statement.attrs)
        array = rounded(node, array)
        content = target.content.copy()
        content[target.index] = array
        return Value(array, content, target.index)


def _arrays(sources: Sequence[Value | None]) -> list[Array | None]:
    return [None if source is None else source.array for source in sources]


def rounded(node: Node, array: Array) -> Array:
    """The array, rounded to the node's type."""
    dtype = node.dtype
    if dtype.kind == "int":
        return array.astype(np.int64)
    if dtype.block > 1:
        return decoded(dtype, encode_rows(dtype, np.ascontiguousarray(array, np.float32)))
    return oracle.run("cast", [array], dtype=dtype.name)


def reached(builder: Builder, plan: PlanText) -> set[str]:
    """The statements that a plan runs."""
    statements = {s.name: s for s in builder.statements}
    names: set[str] = set()
    stack = list(plan.roots)
    while stack:
        name = stack.pop()
        if name not in names:
            names.add(name)
            stack += [arg for arg in statements[name].args if arg]
    return names


def after(builder: Builder, plan: PlanText, run: Evaluation) -> dict[str, Array]:
    """Contents of each state after a run: those of the plan's last write to it."""
    states: dict[str, Array] = {}
    names = reached(builder, plan)
    for statement in builder.statements:
        node = builder.nodes[statement.name]
        if statement.name not in names or not (
            statement.op == "state" or node.op.writes is not None
        ):
            continue
        root = node.root
        content = run.values[statement.name].content
        if content is None:
            raise PyggmlError(f"{statement}: its target must be a state or a view of one")
        states[root.attrs["name"]] = content.reshape(root.ne[::-1])
    return states


def runs(
    builder: Builder,
    plan: PlanText,
    states: Mapping[str, Array],
    noise: Mapping[str, float],
    seed: int,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """(outputs, states after the last run) of `repeat` runs of a plan."""
    contents = dict(states)
    outputs: dict[str, Array] = {}
    for number in range(int(plan.attrs.get("repeat", 1))):
        run = Evaluation(builder, contents, noise, seed + number)
        outputs = {key: run.values[key].array for key in plan.outputs}
        contents |= after(builder, plan, run)
    return outputs, contents
