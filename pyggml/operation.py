"""Op: an operation, defined by its shape rule. Calling it builds a node."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar, overload

from pyggml.arguments import Parameters, signature_of
from pyggml.errors import DTypeError, PyggmlError, ShapeError, UnknownNameError
from pyggml.interning import key_of, node_table, record_new
from pyggml.node import Node, Sources, label_of, record_line
from pyggml.spec import Ne, Spec
from pyggml.traits import Axis, Cost, Ids, Slice
from pyggml.where import at_line

P = ParamSpec("P")
M = TypeVar("M", bound="Callable[..., Node]")
ShapeRule: TypeAlias = Callable[P, "Spec | tuple[Spec, dict[str, Any]]"]
SliceRule: TypeAlias = Callable[[Node, Axis, int], "Slice | None"]
ViewRule: TypeAlias = Callable[[Node, Ne], "tuple[int, Ne] | None"]
CostRule: TypeAlias = Callable[[Node], Cost]
PartsRule: TypeAlias = Callable[[Node], tuple[Ne, ...]]


class Op(Generic[P]):
    """An operation. Calling it checks the arguments by its shape rule and returns a node.

    The rule's positional parameters are the tensors, and its keyword-only parameters are the
    attributes. `operands` maps the tensors' names to their indices in `src`; those of `*others`
    follow without names.

    name     the op's name; by default the rule's
    view     for an op whose result is a view of operand 0: `view(node, nb) -> (offset, nb)` returns
             the result's byte offset in the operand and its byte strides, from the operand's
             strides. None if this needs a copy
    writes   the operand that the op writes into; the result is that operand's new handle
    ids      the operand that holds ids, and what they choose from
    weights  operands that a matrix product reads as its weights
    linear   operands in which the op is linear together, while the others are fixed: applied to
             the parts of a sum, it gives the parts of a sum
    leaf     an op without operands; every call makes a new node
    joint    several devices take a step of this op together, so none may leave it out
    parts    for an op that only gathers its operands: `parts(node)` returns where in the result
             each operand starts
    cost     the cost rule; see `Op.cost`
    slices   the slice rule; see `Op.slices`
    """

    def __init__(
        self,
        rule: ShapeRule[P],
        *,
        name: str | None = None,
        view: ViewRule | None = None,
        writes: str | None = None,
        ids: Ids | None = None,
        weights: tuple[str, ...] = (),
        linear: tuple[str, ...] = (),
        leaf: bool = False,
        joint: bool = False,
        parts: PartsRule | None = None,
        cost: CostRule | None = None,
        slices: SliceRule | None = None,
    ) -> None:
        self.name = self.__name__ = name or rule.__name__
        self.__doc__ = rule.__doc__
        self.__module__ = rule.__module__
        self.__wrapped__ = rule
        signature = signature_of(rule)
        self.__signature__ = signature.replace(return_annotation=Node)  # for help and editors
        self._parameters = Parameters(self.name, signature)
        self.operands = {tensor: index for index, tensor in enumerate(self._parameters.tensors)}
        self.rule = rule
        self.view = view
        self.writes = None if writes is None else self.index(writes)
        self.ids = ids
        self.weights = weights
        self.linear = linear
        self.leaf = leaf
        self.joint = joint
        self.parts = parts
        self.meaning: Callable[..., Node] | None = None
        self.means_where: Callable[[Node], bool] | None = None
        self.cost_rule = cost
        self.slice_rule = slices
        for operand in (*weights, *linear, *((ids.operand, ids.of) if ids is not None else ())):
            self.index(operand)

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __get__(self, instance: object, owner: type | None = None) -> Op[P]:
        """The op itself. Having this method makes pydoc, and so `help`, show it as a function."""
        return self

    def index(self, operand: str) -> int:
        """The index in `src` of the operand with this name; UnknownNameError if there is none."""
        index = self.operands.get(operand) if isinstance(operand, str) else None
        if index is None:
            if not isinstance(operand, str):
                raise UnknownNameError(
                    f"node[{operand!r}]: nodes have no slices; use view(node, ne=.., start=..) for "
                    "a part, or get_rows(node, ids) for rows. node['a'] is the source called a"
                )
            names = ", ".join(self.operands) or "none"
            raise UnknownNameError(
                f"{self.name} has no operand {operand!r}; its operands are: {names}"
            )
        return index

    # -- definition -------------------------------------------------------------------------

    @overload
    def means(self, meaning: M, /) -> M: ...

    @overload
    def means(self, *, where: Callable[[Node], bool]) -> Callable[[M], M]: ...

    def means(self, meaning: Any = None, *, where: Callable[[Node], bool] | None = None) -> Any:
        """Decorator: the same computation in simpler ops.

        The function gets the node's sources and attributes and returns a node. DTypeError if it
        does not take the arguments of the rule.

        where  returns whether a node has this meaning; without it, all nodes of the op have
        """
        if meaning is None:
            self.means_where = where
            return self.means
        self._parameters.check_meaning(meaning)
        self.meaning = meaning
        return meaning

    def composes(self, node: Node) -> bool:
        """Whether `node`, which has this op, has a meaning in simpler ops."""
        return self.meaning is not None and (self.means_where is None or self.means_where(node))

    def cost(self, rule: CostRule) -> CostRule:
        """Decorator: `rule(node)` returns the node's Cost.

        The default is one operation per element of the result, and every byte read or written once.
        """
        self.cost_rule = rule
        return rule

    def slices(self, rule: SliceRule) -> SliceRule:
        """Decorator: `rule(node, axis, n)` returns how to compute a piece of `n` elements.

        None if the node cannot be cut along `axis`, which is a dimension of the result or the name
        of a reduction whose partial results are merged.
        """
        self.slice_rule = rule
        return rule

    # -- use --------------------------------------------------------------------------------

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Node:
        try:
            src, attrs = self._parameters.bind(args, kwargs)
        except PyggmlError as error:
            raise at_line(error, str(error)) from None
        try:
            result = self.rule(*src, **attrs)  # type: ignore[arg-type]
        except PyggmlError as error:
            raise self._in_context(error, src) from None
        spec, changes = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not isinstance(spec, Spec) or not isinstance(changes, Mapping):
            raise self._in_context(DTypeError(self._not_a_spec(result)), src)
        return self.make(src, {**attrs, **changes}, spec)

    def again(self, node: Node, **changes: Any) -> Node:
        """`node`, which has this op, with some attributes changed."""
        return self(*node.src, **{**node.attrs, **changes})  # type: ignore[arg-type]

    def make(self, src: Sources, attrs: dict[str, Any], spec: Spec, line: bool = True) -> Node:
        """The node with these parts: the existing one, or a new one.

        The parts are not checked; rewrites build nodes from parts that a call has checked.

        line  whether to record the user's current line as the line that built the node
        """
        if self.leaf:
            return self._new(src, attrs, spec, line)
        table, key = node_table(), key_of(self, src, attrs, spec)
        node = table.get(key)
        if node is None:
            node = table[key] = self._new(src, attrs, spec, line)
        return node

    def layout(self, node: Node) -> tuple[int, Ne]:
        """The byte offset of `node` in its root, and its byte strides."""
        if self.view is not None and node.src[0] is not None:
            source = node.src[0]
            layout = self.view(node, source.nb)
            if layout is None:
                error = ShapeError("the source is not contiguous there; use cont(a) first")
                raise self._in_context(error, node.src)
            return source.offset + layout[0], layout[1]
        if self.writes is not None:
            target = node.src[self.writes]
            assert target is not None
            return target.offset, target.nb
        return 0, node.spec.nb

    def _new(self, src: Sources, attrs: dict[str, Any], spec: Spec, line: bool) -> Node:
        node = Node(self, src, MappingProxyType(attrs), spec)
        if line:
            record_line(node)
        record_new(node)
        return node

    def _not_a_spec(self, result: object) -> str:
        """The message for a rule that returned something other than a Spec."""
        hint = ""
        if isinstance(result, Node):
            hint = f"; return node.spec, and put how to compute it into @{self.name}.means"
        name = type(result).__name__
        return f"its rule must return a Spec (or a Spec and attributes), not {name}{hint}"

    def _in_context(self, error: PyggmlError, src: Sources) -> PyggmlError:
        """A rule's error with the op, its tensors, their sizes and the user's line added."""
        more = (f"{self._parameters.more}[{i}]" for i in range(len(src) - len(self.operands)))
        tensors = {key: s for key, s in zip((*self.operands, *more), src) if s is not None}
        text = f"{self.name}({', '.join(map(label_of, tensors.values()))}): {error}"
        if tensors:
            sizes = ", ".join(f"{key}={s.spec}" for key, s in tensors.items())
            shapes = ", ".join(f"{key}={s.shape}" for key, s in tensors.items())
            text += f" (ne order: {sizes}; numpy shapes: {shapes})"
        return at_line(error, text)


@overload
def op(rule: ShapeRule[P], /) -> Op[P]: ...


@overload
def op(
    *,
    name: str | None = None,
    view: ViewRule | None = None,
    writes: str | None = None,
    ids: Ids | None = None,
    weights: tuple[str, ...] = (),
    linear: tuple[str, ...] = (),
    parts: PartsRule | None = None,
    cost: CostRule | None = None,
    slices: SliceRule | None = None,
) -> Callable[[ShapeRule[P]], Op[P]]: ...


def op(rule: Any = None, /, **options: Any) -> Any:
    """Decorator: make a shape rule into an Op, as `@op` or `@op(slices=..., ...)`.

    The rule gets nodes and attributes. It returns the result's Spec, or the Spec and a dict of
    attributes to replace, or raises ShapeError or DTypeError; pyggml adds the names, the sizes and
    the user's line to the message. The options are those of `Op`.
    """
    if rule is not None:
        return Op(rule)
    return functools.partial(Op, **options)


def slice_of(node: Node, axis: Axis, n: int) -> Slice | None:
    """How to compute a piece of `node`, by its op's slice rule; None without a rule."""
    rule = node.op.slice_rule
    return rule(node, axis, n) if rule is not None else None


def cost_of(node: Node) -> Cost:
    """The cost of `node` by its op's rule, or the default; views and leaves cost nothing."""
    if node.op.cost_rule is not None:
        return node.op.cost_rule(node)
    if node.op.view is not None or node.op.leaf:
        return Cost(0.0, 0.0)
    read = sum(s.spec.nbytes for s in dict.fromkeys(node.src) if s is not None)
    return Cost(float(node.spec.elements), float(read + node.spec.nbytes))
