"""What can be computed: shape rule, formula, cost, slice rule and meaning of every operation.

No array code and no device. Each family's `__all__` says what it offers; everything else follows
from these lists. `ALL` maps the names of the ops to the ops.
"""

# ruff: noqa: F403
from inspect import ismodule as _ismodule
from typing import Any as _Any

import pyggml.ops.operators as _operators  # noqa: F401  what + - * / on nodes build
from pyggml.node import Op as _Op
from pyggml.ops.attention import *
from pyggml.ops.copy import *
from pyggml.ops.elementwise import *
from pyggml.ops.leaf import *
from pyggml.ops.linear import *
from pyggml.ops.merge import *
from pyggml.ops.moe import *
from pyggml.ops.norm import *
from pyggml.ops.reduce import *
from pyggml.ops.rope import *
from pyggml.ops.views import *

__all__ = sorted(
    name for name, value in globals().items() if not name.startswith("_") and not _ismodule(value)
)

# Not for users: the budget's loops build them.
from pyggml.ops.merge import lse_finish as lse_finish
from pyggml.ops.merge import lse_sum as lse_sum

ALL: dict[str, _Op[_Any]] = {op.name: op for op in list(globals().values()) if isinstance(op, _Op)}

assert __name__ == "pyggml.ops", "import pyggml.ops, not the top-level folder ops"
