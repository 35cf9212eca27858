"""Node: one operation in a graph. Also the labels of nodes and the lines that built them.

A node says what is computed from what. It knows no device, no memory and no array. Labels and
lines are in tables next to the nodes, because they are not part of what a node is: two equal nodes
with different labels are one node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from pyggml.arithmetic import Arithmetic
from pyggml.dtypes import DType
from pyggml.errors import DTypeError, UnknownNameError
from pyggml.spec import Ne, Spec
from pyggml.where import at_line, user_line

if TYPE_CHECKING:
    from pyggml.operation import Op

Attrs: TypeAlias = Mapping[str, Any]
Sources: TypeAlias = tuple["Node | None", ...]


class Node(Arithmetic):
    """One operation in a graph: an op, its sources, its attributes, and the result's spec.

    Nodes are frozen. Building a node twice returns the same object, and `==` is identity.
    `node["mask"]` is the source that the op calls `mask`; `node.get("mask")` is None if the node
    has no mask.

    nb      byte strides in ne order
    offset  byte offset from the start of `root`. `nb` and `offset` follow from the graph alone;
            a plan may put the tensor elsewhere, with other strides
    """

    __slots__ = ("__weakref__", "_base", "_root", "attrs", "nb", "offset", "op", "spec", "src")

    op: Op[Any]
    src: Sources
    attrs: Attrs
    spec: Spec
    nb: Ne
    offset: int
    # None means the node itself: a reference to itself would keep it alive.
    _base: Node | None
    _root: Node | None

    def __init__(self, op: Op[Any], src: Sources, attrs: Attrs, spec: Spec) -> None:
        put = object.__setattr__
        put(self, "op", op)
        put(self, "src", src)
        put(self, "attrs", attrs)
        put(self, "spec", spec)
        source = src[0] if op.view is not None else None
        target = src[op.writes] if op.writes is not None else source
        put(self, "_base", source and source.base)
        put(self, "_root", target and target.root)
        offset, nb = op.layout(self)
        put(self, "offset", offset)
        put(self, "nb", nb)

    def over(self, src: Sources) -> Node:
        """This node over other sources that have the specs and strides of its own."""
        node: Node = object.__new__(Node)
        put = object.__setattr__
        put(node, "op", self.op)
        put(node, "src", src)
        put(node, "attrs", self.attrs)
        put(node, "spec", self.spec)
        put(node, "offset", self.offset)
        put(node, "nb", self.nb)
        source = src[0] if self.op.view is not None else None
        target = src[self.op.writes] if self.op.writes is not None else source
        put(node, "_base", source and source.base)
        put(node, "_root", target and target.root)
        return node

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"nodes are frozen: cannot set {name!r}; build a new node")

    def __getitem__(self, operand: str) -> Node:
        """The source with this name.

        UnknownNameError if the op has no such operand or the node was built without it.
        """
        source = self.src[self.op.index(operand)]
        if source is None:
            raise UnknownNameError(
                f"{self!r} has no {operand}; use node.get({operand!r}), which returns None here"
            )
        return source

    def get(self, operand: str) -> Node | None:
        """The source with this name, or None if the node was built without it."""
        return self.src[self.op.index(operand)]

    __iter__: None = None  # otherwise Python would iterate over node[0], node[1], ...

    @property
    def ne(self) -> Ne:
        """Four sizes in ggml's order; dimension 0 is contiguous."""
        return self.spec.ne

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes in NumPy's order, with the number of dimensions that the user gave."""
        return self.spec.shape

    @property
    def dtype(self) -> DType:
        """The element type; its `.name` is ggml's, such as "q8_0"."""
        return self.spec.dtype

    @property
    def base(self) -> Node:
        """The node that computed these values: views are skipped, writes are not."""
        return self if self._base is None else self._base

    @property
    def root(self) -> Node:
        """The node that owns this one's memory: views and writes are skipped."""
        return self if self._root is None else self._root

    @property
    def contiguous(self) -> bool:
        """Whether the strides are those of a fresh tensor, ignoring dimensions of size 1."""
        return all(n == 1 or b == fresh for n, b, fresh in zip(self.ne, self.nb, self.spec.nb))

    def __repr__(self) -> str:
        return f"<{label_of(self)}: {self.spec}>"


_labels: WeakKeyDictionary[Node, tuple[str, ...]] = WeakKeyDictionary()
_lines: WeakKeyDictionary[Node, tuple[str, int]] = WeakKeyDictionary()


def label(node: Node, text: str) -> Node:
    """Add a label to `node` and return the node. A node can have several labels.

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
    """All labels of `node`, oldest first."""
    return _labels.get(node, ())


def label_of(node: Node) -> str:
    """The newest label of `node`, or its op's name if it has none."""
    texts = _labels.get(node)
    return texts[-1] if texts else node.op.name


def line_of(node: Node) -> str:
    """`file:line` of the user's code that built `node`, or an empty string."""
    line = _lines.get(node)
    return f"{line[0]}:{line[1]}" if line else ""


def record_line(node: Node) -> None:
    """Record that the user's current line built `node`."""
    _lines[node] = user_line(4)  # of record_line, _new and make


def copy_names(new: Node, old: Node) -> None:
    """Give `new`, which has no labels and no line, those of `old`."""
    texts = _labels.get(old)
    if texts:
        _labels[new] = texts
    line = _lines.get(old)
    if line:
        _lines[new] = line


def copy_line(new: Node, old: Node) -> Node:
    """Give `new` the line of `old`, and return `new`."""
    if old in _lines:
        _lines[new] = _lines[old]
    return new
