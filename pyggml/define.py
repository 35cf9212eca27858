"""For authors of ops: the types and decorators to write shape, cost and slice rules with.

    import pyggml as gg
    from pyggml import define

    @define.op
    def leaky_relu(a: define.Node, *, slope: float) -> define.Spec: ...

docs/adding-an-op.md has a complete op.
"""

from pyggml.node import Axis, Cost, Cut, Ids, Node, Op, Slice, Spec, located, op

__all__ = ["Axis", "Cost", "Cut", "Ids", "Node", "Op", "Slice", "Spec", "located", "op"]
