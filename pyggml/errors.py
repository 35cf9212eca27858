"""The exceptions of pyggml: one base class, beside it the built-in one a user would catch."""

from __future__ import annotations


class PyggmlError(Exception):
    """Base of every error raised on purpose; its text says what is wrong, where, what to do."""

    def __str__(self) -> str:
        # KeyError would print the repr of its argument.
        return str(self.args[0]) if self.args else ""


class ShapeError(PyggmlError, ValueError):
    """Sizes, strides or attribute values that do not fit together."""


class DTypeError(PyggmlError, TypeError):
    """An element type that the operation does not take, or an argument of the wrong kind."""


class GraphError(PyggmlError, ValueError):
    """A graph that cannot be ordered or run as it stands: a state written twice, ..."""


class UnsupportedOpError(PyggmlError, NotImplementedError):
    """No backend can run a node, not even through its meaning in simpler ops."""


class OutOfMemoryError(PyggmlError, MemoryError):
    """The memory asked for does not exist; carries what was planned."""


class BudgetError(OutOfMemoryError):
    """The attention memory budget is too small; `least` is the smallest in MiB that works."""

    def __init__(self, message: str, least: float) -> None:
        super().__init__(message)
        self.least = least


class GGUFError(PyggmlError, ValueError):
    """A file that is not a readable GGUF file: byte offset and field say where that shows."""


class DeviceError(PyggmlError, RuntimeError):
    """A device that is absent, described only, or failed."""


class IdError(PyggmlError, IndexError):
    """A row or expert id past the end."""


class StateWarning(UserWarning):
    """A state is used in a way that is legal and hardly meant: a write that never happens or that
    its reader does not see."""


class UnknownNameError(PyggmlError, KeyError):
    """A name (input, output, state, type, backend, preset) that does not exist here."""
