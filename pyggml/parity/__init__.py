"""Is a backend right? The float64 statement of every op, the bounds, and how results compare.

The package is also a function: `gg.parity(outputs, a, b, inputs)` (see `nodes.parity`).
"""

import sys
from inspect import signature
from types import ModuleType

from pyggml.parity.nodes import parity


class Parity(ModuleType):
    """This module's type: `gg.parity(...)` is `pyggml.parity.nodes.parity(...)`."""

    __call__ = staticmethod(parity)


sys.modules[__name__].__class__ = Parity
__signature__ = signature(parity)  # for help and editors
