"""The backend object: NumPy's kernels in host memory."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from pyggml.backends.host import HostBackend
from pyggml.backends.numpy.table import KERNELS

# Importing a module registers its kernels.
for _module in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if _module.name != "backend":
        importlib.import_module(f"pyggml.backends.numpy.{_module.name}")


class NumpyBackend(HostBackend):
    """The host with NumPy's kernels."""

    name = "numpy"
    kernels = KERNELS
