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


#: Backends in the host's memory, the preferred one first; the last one always works.
HOSTS = ("cpu", "numpy")


def preferred() -> tuple[str, ...]:
    """The backends to use if nobody chooses: a GPU's if it works here, then `on_host()`."""
    names = [name for name in available() if name not in (*STAND_INS, *HOSTS)]
    return (*filter(_present, names), on_host())


def on_host() -> str:
    """The backend to use in the host's memory: cpu if it works here, else numpy."""
    return next(name for name in HOSTS if name == HOSTS[-1] or _present(name))


def _present(name: str) -> bool:
    present: bool = importlib.import_module(f"{__name__}.{name}").present()
    return present


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
