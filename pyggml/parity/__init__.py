"""Is a backend right? Every op in float64, error bounds, and comparisons of results and graphs."""

import sys as _sys
from types import ModuleType as _ModuleType
from typing import NoReturn as _NoReturn


class _Parity(_ModuleType):
    """Raises an error with the new name when code calls `gg.parity(...)`, once a function."""

    def __call__(self, *_: object, **__: object) -> _NoReturn:
        raise TypeError("pyggml.parity is a package; the function is now gg.compare")


_sys.modules[__name__].__class__ = _Parity
