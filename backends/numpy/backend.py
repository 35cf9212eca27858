"""The backend object: kernels in NumPy on the host's memory."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from pyggml.backends.host import HostBackend
from pyggml.backends.numpy.table import KERNELS

# Every family of kernels registers itself.
for _module in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if _module.name != "backend":
        importlib.import_module(f"pyggml.backends.numpy.{_module.name}")


class NumpyBackend(HostBackend):
    """The host, with kernels in NumPy."""

    name = "numpy"
    kernels = KERNELS
