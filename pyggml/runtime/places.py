"""Places where a graph may run: `NAME[:INDEX][:SIZE]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyggml import backends
from pyggml.backends.base import Backend
from pyggml.errors import DeviceError, DTypeError

_FORM = re.compile(
    r"(?P<name>[a-z_]+)(?::(?P<index>\d+))?(?::(?P<size>\d+(?:\.\d+)?)(?P<unit>[KMGT]iB))?"
)
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, slots=True)
class Place:
    """A device by name: `numpy`, `cuda:1`, or `cuda:0:24GiB`, for planning only.

    size, size_text  the size in bytes and as text ("24GiB"); None and "" without one
    """

    name: str
    index: int
    size: int | None
    size_text: str

    def __str__(self) -> str:
        return self.backend.place + (f":{self.size_text}" if self.size_text else "")

    @property
    def backend(self) -> Backend:
        return backends.get(self.name, self.index)


def parse(text: str) -> Place:
    """The place that `text` names.

    Errors: DTypeError if it is not a string, DeviceError if it is malformed, UnknownNameError for
    an unknown backend.
    """
    if not isinstance(text, str):
        raise DTypeError(f"a place must be a string such as 'cuda:0' or 'numpy', not {text!r}")
    match = _FORM.fullmatch(text)
    if match is None:
        raise DeviceError(
            f"{text!r} is not a place; expected NAME[:INDEX][:SIZE] such as cuda:0:24GiB"
        )
    size = match["size"]
    nbytes = int(float(size) * _UNITS[match["unit"]]) if size else None
    name, index = match["name"], int(match["index"] or 0)
    backends.get(name, index)  # raises if the backend is unknown
    return Place(name, index, nbytes, f"{size}{match['unit']}" if size else "")
