"""pyggml: ggml-style compute graphs in Python.

import pyggml as gg

w = gg.constant(array, type="q8_0", name="w")
x = gg.input("x", "f32", ne=(2048, 32))
plan = gg.compile({"y": gg.mul_mat(w, x)})
y = plan.run(x=values)["y"]
print(plan.memory)
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING

# ops/ and backends/ stand at the top of the checkout and are linked into this folder;
# a checkout without symbolic links looks beside us.
if not (_Path(__file__).parent / "ops").is_dir():
    __path__.append(str(_Path(__file__).resolve().parent.parent))

from pyggml.errors import (
    BudgetError,
    DeviceError,
    DTypeError,
    GGUFError,
    GraphError,
    IdError,
    OutOfMemoryError,
    PyggmlError,
    ShapeError,
    UnknownName,
    UnsupportedOp,
)
from pyggml.graph import Graph
from pyggml.node import Cost, Cut, Node, Op, Slice, Spec, labels, make_spec, name, op
from pyggml.ops import *  # noqa: F403
from pyggml.ops import __all__ as _ops
from pyggml.runtime.plan import Plan, compile
from pyggml.runtime.store import Store

if _TYPE_CHECKING:
    from pyggml.parity import Parity as _Parity

    parity: _Parity  # a package that can be called

__version__ = "0.1.0"

_MODULES = ("backends", "gguf", "models", "parity", "viz")


def __getattr__(name: str) -> _ModuleType:
    """Modules that are imported when first used."""
    if name in _MODULES:
        return _import_module(f"pyggml.{name}")
    raise AttributeError(f"module 'pyggml' has no attribute {name!r}")


__all__ = [
    "BudgetError",
    "Cost",
    "Cut",
    "DTypeError",
    "DeviceError",
    "GGUFError",
    "Graph",
    "GraphError",
    "IdError",
    "Node",
    "Op",
    "OutOfMemoryError",
    "Plan",
    "PyggmlError",
    "ShapeError",
    "Slice",
    "Spec",
    "Store",
    "UnknownName",
    "UnsupportedOp",
    "compile",
    "labels",
    "make_spec",
    "name",
    "op",
    *_ops,
]
