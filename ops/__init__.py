"""The ops: shape rule, formula, cost, slice rule and meaning of each. No array code, no device.

Each family lists its builders in `__all__`; `BUILDERS` and `ALL` (name -> op) are made from those
lists.
"""

# ruff: noqa: E402, F403
import typing as _typing
from inspect import ismodule as _ismodule

import pyggml.ops.listed as _listed  # noqa: F401  the meaning of attention to a list of keys
import pyggml.ops.operators as _operators  # noqa: F401  fills the table of + - * / on nodes
from pyggml.operation import Op as _Op
from pyggml.ops.attention import *
from pyggml.ops.collective import *
from pyggml.ops.copy import *
from pyggml.ops.elementwise import *
from pyggml.ops.hyper_connections import *
from pyggml.ops.indexer import *
from pyggml.ops.leaf import *
from pyggml.ops.linear import *
from pyggml.ops.merge import *
from pyggml.ops.moe import *
from pyggml.ops.norm import *
from pyggml.ops.reduce import *
from pyggml.ops.rope import *
from pyggml.ops.views import *

#: The names that users call, `pyggml.NAME`.
BUILDERS = tuple(
    sorted(name for name, value in globals().items() if name[0] != "_" and not _ismodule(value))
)
if not _typing.TYPE_CHECKING:  # mypy treats an `__all__` that it cannot evaluate as empty
    __all__ = BUILDERS

# Not for users: only the budget's loops build these.
from pyggml.ops.merge import lse_finish as lse_finish
from pyggml.ops.merge import lse_sum as lse_sum

ALL: dict[str, _Op[_typing.Any]] = {
    op.name: op for op in list(globals().values()) if isinstance(op, _Op)
}

assert __name__ == "pyggml.ops", "import pyggml.ops, not the top-level folder ops"
