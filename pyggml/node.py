"""Node and Op: what is computed from what. No device, no memory, no array code.

Nodes are frozen, hash-consed and compared by identity; each has one output. Building the same
node twice returns the same object. Leaves are new with each call, and two leaves of one name in a
graph are an error. Labels and the user's line are in side tables, so they are not part of a
node's identity. While a graph is compiled, the nodes that passes build belong to that graph alone
(`rewriting`): labels that a rewrite carries over never reach an equal node of another graph.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Generic, ParamSpec, TypeAlias, overload
from weakref import WeakKeyDictionary, WeakValueDictionary

from pyggml.arithmetic import Arithmetic
from pyggml.attributes import Attribute, identity, near, not_a_tensor, signature_of
from pyggml.dtypes import DType
from pyggml.errors import DTypeError, PyggmlError, ShapeError, UnknownNameError
from pyggml.renamed import KEYWORDS
from pyggml.spec import Ne as Ne
from pyggml.spec import Spec as Spec
from pyggml.spec import integers as integers
from pyggml.traits import Axis as Axis
from pyggml.traits import Cost as Cost
from pyggml.traits import Cut as Cut
from pyggml.traits import Ids as Ids
from pyggml.traits import Slice as Slice
from pyggml.where import at_line, user_line
from pyggml.written import note_write

P = ParamSpec("P")
Attrs: TypeAlias = Mapping[str, Any]
Sources: TypeAlias = tuple["Node | None", ...]


class Node(Arithmetic):
    """One operation in a graph: op, sources, attributes, spec. Frozen, hash-consed.

    `==` is identity: building the same node twice gives the same object.
    `node["mask"]` is the source that the op calls `mask`; `node.get("mask")` is None without one.
    `ne` is ggml's order, `shape` NumPy's. `nb` are the byte strides, and `offset` the bytes from
    the start of `root`, if nothing but views moved the tensor: never where bytes really are.
    """

    __slots__ = ("__weakref__", "_base", "_root", "attrs", "nb", "offset", "op", "spec", "src")

    op: Op[Any]
    src: tuple[Node | None, ...]
    attrs: Attrs
    spec: Spec
    nb: Ne
    offset: int
    _base: Node | None  # None for itself: a node must not hold itself alive
    _root: Node | None

    def __init__(self, op: Op[Any], src: Sources, attrs: Attrs, spec: Spec, nb: Ne) -> None:
        put = object.__setattr__
        put(self, "op", op)
        put(self, "src", src)
        put(self, "attrs", attrs)
        put(self, "spec", spec)
        put(self, "nb", nb)
        put(self, "offset", 0)
        shown = src[0] if op.view is not None else None
        written = src[op.writes] if op.writes is not None else shown
        put(self, "_base", shown and shown.base)
        put(self, "_root", written and written.root)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"nodes are frozen: cannot set {name!r}; build a new node")

    def __getitem__(self, operand: str) -> Node:
        """The source of that name. UnknownNameError where the op has none, or this node none."""
        source = self.src[self.op.index(operand)]
        if source is None:
            raise UnknownNameError(
                f"{self!r} has no {operand}; node.get({operand!r}) gives None there"
            )
        return source

    def get(self, operand: str) -> Node | None:
        """The source of that name, None where it was left out."""
        return self.src[self.op.index(operand)]

    __iter__: None = None  # Python would try node[0], node[1], ... otherwise

    @property
    def ne(self) -> Ne:
        """Four sizes in ggml's order, ne[0] contiguous."""
        return self.spec.ne

    @property
    def shape(self) -> tuple[int, ...]:
        """NumPy's order, as many sizes as the maker gave."""
        return self.spec.shape

    @property
    def dtype(self) -> DType:
        """The type of its elements; `.name` is ggml's name, "q8_0"."""
        return self.spec.dtype

    @property
    def base(self) -> Node:
        """The node whose values this one shows: through views, not through writes."""
        return self if self._base is None else self._base

    @property
    def root(self) -> Node:
        """The node whose memory this one is in: through views and writes."""
        return self if self._root is None else self._root

    @property
    def contiguous(self) -> bool:
        """Strides equal those of a fresh tensor; dimensions of size 1 do not count."""
        fresh = self.spec.nb
        return all(n == 1 or have == want for n, have, want in zip(self.ne, self.nb, fresh))

    def __repr__(self) -> str:
        return f"<{label_of(self)}: {self.spec}>"


# Side tables: what people want to know of a node and what is not its identity.
_interned: WeakValueDictionary[tuple[object, ...], Node] = WeakValueDictionary()
_labels: WeakKeyDictionary[Node, tuple[str, ...]] = WeakKeyDictionary()
_lines: WeakKeyDictionary[Node, tuple[str, int]] = WeakKeyDictionary()


class _Rewrite:
    """The nodes of one graph while it is compiled, and those that its passes build."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.interned = {_key(n.op, n.src, n.attrs, n.spec): n for n in nodes if not n.op.leaf}
        self.built: set[Node] = set()


_rewrite: ContextVar[_Rewrite | None] = ContextVar("rewrite", default=None)


@contextmanager
def rewriting(nodes: Iterable[Node]) -> Iterator[None]:
    """While a graph of `nodes` is rewritten, new nodes are its own.

    They are shared with no other graph, so that labels which rewrites carry over stay with it.
    """
    token = _rewrite.set(_Rewrite(nodes))
    try:
        yield
    finally:
        _rewrite.reset(token)


def _key(op: Op[Any], src: tuple[Node | None, ...], attrs: Attrs, spec: Spec) -> tuple[object, ...]:
    return (op, src, *map(identity, attrs.values()), spec)


def label(node: Node, text: str) -> Node:
    """Give `node` a label and return it. A node can have several labels.

    Labels name tensors in errors, plans, pins and `observe=`.
    """
    if not isinstance(node, Node) or not isinstance(text, str):
        raise at_line(
            DTypeError(), f"label(node, text) takes a node and a string; got {node!r} and {text!r}"
        )
    if text not in _labels.get(node, ()):
        _labels[node] = (*_labels.get(node, ()), text)
    return node


def labels(node: Node) -> tuple[str, ...]:
    """Every label of `node`, oldest first."""
    return _labels.get(node, ())


def label_of(node: Node) -> str:
    """The newest label, else the op's name."""
    found = _labels.get(node)
    return found[-1] if found else node.op.name


def line_of(node: Node) -> str:
    """`file:line` of the user's code that built `node`, or an empty string."""
    found = _lines.get(node)
    return f"{found[0]}:{found[1]}" if found else ""


def stand_at(new: Node, old: Node) -> Node:
    """Let `new`, a part of what `old` means, name the line that built `old`."""
    if old in _lines:
        _lines[new] = _lines[old]
    return new


def inherit(new: Node, old: Node) -> Node:
    """Let `new`, which replaces `old`, carry its labels and its line.

    A node that the user built keeps its own: other graphs may hold it too.
    """
    rewrite = _rewrite.get()
    if new is not old and (rewrite is None or new in rewrite.built):
        for text in _labels.get(old, ()):
            label(new, text)
        stand_at(new, old)
    return new


ShapeRule: TypeAlias = Callable[P, "Spec | tuple[Spec, dict[str, Any]]"]
SliceRule: TypeAlias = Callable[[Node, Axis, int], "Slice | None"]
ViewRule: TypeAlias = Callable[[Node, Ne], "tuple[int, Ne] | None"]
CostRule: TypeAlias = Callable[[Node], Cost]
PartsRule: TypeAlias = Callable[[Node], tuple[Ne, ...]]


class Op(Generic[P]):
    """An operation: a shape rule made callable. Calling it builds (or finds) a node.

    Tensors are the rule's positional parameters and attributes its keyword-only ones. `operands`
    maps the tensors' names to their indices in `src`.

    name     what the op is called, where that is not the name of the rule
    view     the result is another view of operand 0 and owns no memory: this rule gives its byte
             offset and strides from those of the operand, or None where that needs a copy
    writes   the operand that the op writes into; the result is that operand's new handle
    ids      the operand that holds ids, and what they choose from
    weights  operands that a matrix product reads as its weights
    leaf     no operands; every call makes a new node
    parts    for a result that only gathers its operands: where in it each of them stands
    cost     the cost rule, as `Op.cost` takes it
    slices   the slice rule, as `Op.slices` takes it
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
        leaf: bool = False,
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
        tensors, attrs = (
            [p for p in signature.parameters.values() if p.kind is kind]
            for kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        )
        self._tensors = {p.name: p.default for p in tensors}
        self._attrs = {p.name: Attribute.of(p) for p in attrs}
        self.operands = {tensor: index for index, tensor in enumerate(self._tensors)}
        self.rule = rule
        self.view = view
        self.writes = None if writes is None else self.index(writes)
        self.ids = ids
        self.weights = weights
        self.leaf = leaf
        self.parts = parts
        self.meaning: Callable[..., Node] | None = None
        self.cost_rule = cost
        self.slice_rule = slices
        for operand in (*weights, *((ids.operand, ids.of) if ids is not None else ())):
            self.index(operand)

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __get__(self, instance: object, owner: type | None = None) -> Op[P]:
        """Itself. pydoc shows an object that has this as a function: `help(op)` needs it."""
        return self

    def index(self, operand: str) -> int:
        """Where in `src` the operand of that name stands."""
        index = self.operands.get(operand)
        if index is None:
            names = ", ".join(self.operands) or "none"
            raise UnknownNameError(
                f"{self.name} has no operand {operand!r}; its operands are: {names}"
            )
        return index

    # -- definition -------------------------------------------------------------------------

    def means(self, meaning: Callable[P, Node]) -> Callable[P, Node]:
        """Decorator: the op said in simpler ops, called with the node's sources and attributes."""
        self.meaning = meaning
        return meaning

    def cost(self, rule: CostRule) -> CostRule:
        """Decorator: the op's cost. Without one: an operation an element, every byte once."""
        self.cost_rule = rule
        return rule

    def slices(self, rule: SliceRule) -> SliceRule:
        """Decorator: the slice rule, `rule(node, axis, n) -> Slice`, None where that cannot be cut.

        `axis` is an output dimension, or the name of a reduction whose pieces are merged.
        """
        self.slice_rule = rule
        return rule

    # -- use --------------------------------------------------------------------------------

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Node:
        try:
            src, attrs = self._bind(args, kwargs)
        except PyggmlError as error:
            raise at_line(error, str(error)) from None
        try:
            made = self.rule(*src, **attrs)  # type: ignore[arg-type]
        except PyggmlError as error:
            raise self._located(error, src) from None
        spec, canonical = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
        if not isinstance(spec, Spec) or not isinstance(canonical, Mapping):
            raise self._located(DTypeError(self._wrong_rule(made)), src)
        return self.make(src, {**attrs, **canonical}, spec)

    def again(self, node: Node, **changed: Any) -> Node:
        """`node`, one of this op's, with some attributes changed."""
        return self(*node.src, **{**node.attrs, **changed})  # type: ignore[arg-type]

    def make(self, src: Sources, attrs: dict[str, Any], made: Spec, line: bool = True) -> Node:
        """The node of these parts, found or new. Rewrites call it with parts already checked."""
        key = _key(self, src, attrs, made)
        rewrite = _rewrite.get()
        interned = _interned if rewrite is None else rewrite.interned
        if not self.leaf:
            same = interned.get(key)
            if same is not None:
                return same
        node = Node(self, src, MappingProxyType(attrs), made, made.nb)
        if self.view is not None and src[0] is not None:
            looked = self.view(node, src[0].nb)
            if looked is None:
                error = ShapeError("the source is not contiguous there; use cont(a) first")
                raise self._located(error, src)
            object.__setattr__(node, "nb", looked[1])
            object.__setattr__(node, "offset", src[0].offset + looked[0])
        elif self.writes is not None:
            target = src[self.writes]
            assert target is not None
            object.__setattr__(node, "nb", target.nb)
            object.__setattr__(node, "offset", target.offset)
        if not self.leaf:
            interned[key] = node
        if line:
            _lines[node] = user_line()
        if rewrite is not None:
            rewrite.built.add(node)
        elif self.writes is not None:
            note_write(node, line_of(node))
        return node

    def _bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Node | None, ...], dict[str, Any]]:
        if len(args) > len(self._tensors):
            raise DTypeError(
                f"{self.name} takes {len(self._tensors)} tensors ({', '.join(self._tensors)}); "
                f"got {len(args)} positional arguments. Attributes are given by keyword"
            )
        for old in KEYWORDS.keys() & kwargs.keys():
            if KEYWORDS[old] in self._attrs and old not in self._attrs:
                raise DTypeError(f"{self.name}: {old}= is now {KEYWORDS[old]}=")
        tensors = list(self._tensors)
        for key in kwargs:
            if key in tensors[: len(args)]:
                raise DTypeError(f"{self.name}: the tensor {key} is given twice")
            if key not in self._tensors and key not in self._attrs:
                raise DTypeError(
                    f"{self.name} has no argument {key!r}{near(key, [*tensors, *self._attrs])} "
                    f"(tensors: {', '.join(tensors)}; attributes: {', '.join(self._attrs)})"
                )
        src: list[Node | None] = []
        for index, (key, default) in enumerate(self._tensors.items()):
            value = args[index] if index < len(args) else kwargs.get(key, default)
            if not isinstance(value, Node) and not (value is None and default is None):
                raise DTypeError(not_a_tensor(self.name, key, value))
            src.append(value)
        attrs: dict[str, Any] = {}
        for key, attribute in self._attrs.items():
            if key not in kwargs and attribute.required:
                raise DTypeError(f"{self.name}: the attribute {key}= is required")
            attrs[key] = attribute.value(self.name, kwargs.get(key, attribute.default))
        return tuple(src), attrs

    def _wrong_rule(self, made: object) -> str:
        """What is wrong where the rule returned no Spec."""
        hint = ""
        if isinstance(made, Node):
            hint = f": return node.spec; how to compute it goes into @{self.name}.means"
        kind = type(made).__name__
        return f"its rule must return a Spec (or a Spec and attributes), not {kind}{hint}"

    def _located(self, error: PyggmlError, src: tuple[Node | None, ...]) -> PyggmlError:
        """The rule's complaint with what the user needs to find the place."""
        given = [s for s in src if s is not None]
        text = f"{self.name}({', '.join(label_of(s) for s in given)}): {error}"
        if given:
            shown = [(key, s) for key, s in zip(self._tensors, src) if s is not None]
            sizes = ", ".join(f"{key}={s.spec}" for key, s in shown)
            shapes = ", ".join(f"{key}={s.shape}" for key, s in shown)
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
    parts: PartsRule | None = None,
    cost: CostRule | None = None,
    slices: SliceRule | None = None,
) -> Callable[[ShapeRule[P]], Op[P]]: ...


def op(rule: Any = None, /, **options: Any) -> Any:
    """Decorator: make an operation of a shape rule, `@op` or `@op(slices=..., ...)`.

    The rule gets nodes and attributes and returns the result's Spec (or the Spec and attributes to
    replace), or raises ShapeError or DTypeError saying what is wrong; names, sizes and the user's
    line are added here. The options are those of `Op`.
    """
    if rule is not None:
        return Op(rule)
    return functools.partial(Op, **options)


def located(build: Callable[P, Node]) -> Callable[P, Node]:
    """Decorator for builders that are no op: their errors name the user's line too."""

    signature = inspect.signature(build)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    form = inspect.Signature(plain)

    @functools.wraps(build)
    def call(*args: P.args, **kwargs: P.kwargs) -> Node:
        try:
            for old in KEYWORDS.keys() & kwargs.keys():
                raise DTypeError(f"{build.__name__}: {old}= is now {KEYWORDS[old]}=")
            return build(*args, **kwargs)
        except PyggmlError as error:
            raise at_line(error, str(error)) from None
        except TypeError:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                wrong = next((key for key in kwargs if key not in signature.parameters), "")
                hint = near(wrong, list(signature.parameters))
                text = f"{build.__name__}: {error}{hint}; call it as {build.__name__}{form}"
                raise at_line(DTypeError(text), text) from None
            raise

    return call


def slice_of(node: Node, axis: Axis, n: int) -> Slice | None:
    """The slice rule of `node`'s op applied, or None."""
    rule = node.op.slice_rule
    return rule(node, axis, n) if rule is not None else None


def cost_of(node: Node) -> Cost:
    """The cost of `node` by its op's rule."""
    if node.op.cost_rule is not None:
        return node.op.cost_rule(node)
    if node.op.view is not None or node.op.leaf:
        return Cost(0.0, 0.0)
    read = sum(s.spec.nbytes for s in dict.fromkeys(node.src) if s is not None)
    return Cost(float(node.spec.elements), float(read + node.spec.nbytes))
