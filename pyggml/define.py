"""For authors of ops: what a shape rule, a cost rule and a slice rule are written with.

    import pyggml as gg
    from pyggml import define

    @define.op
    def leaky_relu(a: define.Node, *, slope: float) -> define.Spec: ...

docs/adding-an-op.md shows a whole op.
"""

from pyggml.node import Axis, Cost, Cut, Ids, Node, Op, Slice, Spec, located, op

__all__ = ["Axis", "Cost", "Cut", "Ids", "Node", "Op", "Slice", "Spec", "located", "op"]
