"""pyggml's exceptions. Each derives from one base class and from the closest built-in class."""

from __future__ import annotations

from typing import Never


class PyggmlError(Exception):
    """Base class of all pyggml errors. The message names the problem, the place and the fix."""

    def __str__(self) -> str:
        # KeyError.__str__ returns the repr of its argument.
        return str(self.args[0]) if self.args else ""


class ShapeError(PyggmlError, ValueError):
    """Sizes, strides or attribute values do not fit together."""


class DTypeError(PyggmlError, TypeError):
    """The operation does not support an element type, or an argument has the wrong type."""


class GraphError(PyggmlError, ValueError):
    """The graph cannot be ordered or run; for example, two nodes write one state."""


class UnsupportedOpError(PyggmlError, NotImplementedError):
    """No backend can run a node, not even after expanding it into simpler ops."""


class OutOfMemoryError(PyggmlError, MemoryError):
    """An allocation failed. The message contains the plan's memory table."""


class BudgetError(OutOfMemoryError):
    """The attention memory budget is too small; `least` is the smallest that works, in MiB."""

    def __init__(self, message: str, least: float) -> None:
        super().__init__(message)
        self.least = least


class GGUFError(PyggmlError, ValueError):
    """A file is not a readable GGUF file. The message names the byte offset and the field."""


class DeviceError(PyggmlError, RuntimeError):
    """A device is absent, only described (for planning), or has failed."""


class IdError(PyggmlError, IndexError):
    """A row or expert id is past the end."""


class StateWarning(UserWarning):
    """A state is used in a legal but probably unintended way: for example, a write that never
    happens, or one that a reader does not see.
    """


class UnknownNameError(PyggmlError, KeyError):
    """A name (of an input, output, state, backend, preset, ...) does not exist."""


class MissingPackageError(PyggmlError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""


class TemplateError(PyggmlError, ValueError):
    """A chat template refuses a conversation, or does what its sandbox forbids."""


def __getattr__(name: str) -> Never:
    """For a name before 0.2, raise an error with the new one. Version 0.3 removes this function."""
    if name in ("UnknownName", "UnsupportedOp"):
        raise AttributeError(f"pyggml.errors.{name} is now {name}Error")
    raise AttributeError(f"module 'pyggml.errors' has no attribute {name!r}")
