"""For authors of ops: types and decorators for shape, cost and slice rules.

    import pyggml as gg
    from pyggml import define

    @define.op
    def leaky_relu(a: define.Node, *, slope: float) -> define.Spec: ...

docs/adding-an-op.md has a complete op.
"""

from pyggml.arguments import located
from pyggml.node import Node
from pyggml.operation import Op, op
from pyggml.spec import Spec
from pyggml.traits import Axis, Cost, Cut, Ids, Slice

__all__ = ["Axis", "Cost", "Cut", "Ids", "Node", "Op", "Slice", "Spec", "located", "op"]
