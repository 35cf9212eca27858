"""Places: `NAME[:INDEX][:SIZE]`, where a graph may run."""

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
    """A device by name: `numpy`, `cuda:1`, or with a size a description of one (`cuda:0:24GiB`).

    size, said  its bytes, and how they were written: None and "" without a size
    """

    name: str
    index: int
    size: int | None
    said: str

    def __str__(self) -> str:
        return self.backend.place + (f":{self.said}" if self.said else "")

    @property
    def backend(self) -> Backend:
        return backends.get(self.name, self.index)


def parse(text: str) -> Place:
    """The place that `text` names. DeviceError if malformed, UnknownNameError for a backend."""
    if not isinstance(text, str):
        raise DTypeError(f"a place is a string such as 'numpy' or 'cuda:0:24GiB', not {text!r}")
    found = _FORM.fullmatch(text)
    if found is None:
        raise DeviceError(f"{text!r} is no place; the form is NAME[:INDEX][:SIZE], cuda:0:24GiB")
    size = found["size"]
    nbytes = int(float(size) * _UNITS[found["unit"]]) if size else None
    name, index = found["name"], int(found["index"] or 0)
    backends.get(name, index)  # raises where there is none
    return Place(name, index, nbytes, f"{size}{found['unit']}" if size else "")
