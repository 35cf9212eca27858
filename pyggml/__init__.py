"""pyggml: ggml-style compute graphs in Python.

import pyggml as gg

w = gg.constant(array, dtype="q8_0", name="w")
x = gg.input("x", "f32", ne=(2048, 32))
plan = gg.compile({"y": gg.mul_mat(w, x)})
y = plan.run(x=values)["y"]
print(plan.memory)

with gg.load("model.gguf") as model:
    logits = model.session(n_ctx=4096).forward([1, 2, 3])
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# ops/ and backends/ are at the top of the checkout, with symbolic links in this folder. In a
# checkout without links they are found through the package's path.
if not (_Path(__file__).parent / "ops").is_dir():
    __path__.append(str(_Path(__file__).resolve().parent.parent))

from pyggml import define
from pyggml.dtypes import DType
from pyggml.errors import (
    BudgetError,
    DeviceError,
    DTypeError,
    GGUFError,
    GraphError,
    IdError,
    MissingPackageError,
    OutOfMemoryError,
    PyggmlError,
    ShapeError,
    StateWarning,
    TemplateError,
    UnknownNameError,
    UnsupportedOpError,
)
from pyggml.graph import Graph
from pyggml.node import Node, label, labels
from pyggml.operation import op
from pyggml.ops import *  # noqa: F403
from pyggml.ops import BUILDERS as _ops
from pyggml.renamed import NAMES as _RENAMED
from pyggml.runtime.compile import compile
from pyggml.runtime.plan import Plan
from pyggml.runtime.store import Store

if _TYPE_CHECKING:
    from pyggml.generate.session import Session
    from pyggml.models.model import Model, load
    from pyggml.parity.nodes import compare
    from pyggml.runtime.mpi import join

__version__ = "0.1.0"

_MODULES = ("backends", "bench", "generate", "gguf", "models", "parity", "viz")
#: Name -> module, for names that are rarely used and slow to import.
_LAZY = {
    "Model": "models.model",
    "Session": "generate.session",
    "compare": "parity.nodes",
    "join": "runtime.mpi",
    "load": "models.model",
}


def __getattr__(name: str) -> _Any:
    """Import modules at their first use. For an old name, raise an error with the new one."""
    if name in _MODULES:
        return _import_module(f"pyggml.{name}")
    if name in _LAZY:
        return getattr(_import_module(f"pyggml.{_LAZY[name]}"), name)
    if name in _RENAMED:
        raise AttributeError(f"pyggml.{name} is now {_RENAMED[name]}")
    raise AttributeError(f"module 'pyggml' has no attribute {name!r}")


__all__ = [
    "BudgetError",
    "DType",
    "DTypeError",
    "DeviceError",
    "GGUFError",
    "Graph",
    "GraphError",
    "IdError",
    "MissingPackageError",
    "Model",
    "Node",
    "OutOfMemoryError",
    "Plan",
    "PyggmlError",
    "Session",
    "ShapeError",
    "StateWarning",
    "Store",
    "TemplateError",
    "UnknownNameError",
    "UnsupportedOpError",
    "compare",
    "compile",
    "define",
    "join",
    "label",
    "labels",
    "load",
    "op",
    *_ops,
]
