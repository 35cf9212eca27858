"""How operations are computed: one folder per backend, found by name, imported on first use."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from pyggml.backends.base import Backend
from pyggml.errors import UnknownNameError

#: Backends that imitate a device in tests: listed last, and used only if requested by name.
STAND_INS = ("null",)


def available() -> tuple[str, ...]:
    """Names of all backends, whether or not their device is present; stand-ins last."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)
    return tuple(sorted(names, key=STAND_INS.__contains__))


def preferred() -> tuple[str, ...]:
    """The backends to use on this machine if nobody chooses: a GPU's if it works, then numpy."""
    names = [name for name in available() if name not in (*STAND_INS, "numpy")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return (*(n for n, module in zip(names, modules) if module.present()), "numpy")


@cache
def get(name: str, index: int = 0) -> Backend:
    """The backend `name` on its device `index`; imports it on first use.

    Errors: UnknownNameError lists the known names; DeviceError if there is no such device.
    """
    if name not in available():
        raise UnknownNameError(f"no backend {name!r}; there are: {', '.join(available())}")
    backend: Backend = importlib.import_module(f"pyggml.backends.{name}").device(index)
    return backend


assert __name__ == "pyggml.backends", "import pyggml.backends, not the top-level folder backends"
