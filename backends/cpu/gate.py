"""How the value of a gate joins the value that it gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gate:
    """act(gate) up; with a limit, act(min(gate, limit)) clamp(up, -limit, limit).

    Its text is part of the names of kernels, which contain the limit as a constant.
    """

    act: str = "silu"
    limit: float | None = None

    @staticmethod
    def of(attrs: Mapping[str, Any]) -> Gate:
        return Gate(attrs["act"], attrs["limit"])

    def __str__(self) -> str:
        return self.act if self.limit is None else f"{self.act}_{self.limit!r}"

    def joined(self, e: Any, gate: Any, up: Any) -> Any:
        """The value for vectors of floats."""
        from pyggml.backends.cpu.native.emit import FLOATS

        limit = None if self.limit is None else e.constant(FLOATS, self.limit)
        return joined(e, self.act, gate, up, limit)


def joined(e: Any, act: str, gate: Any, up: Any, limit: Any = None) -> Any:
    """As `Gate.joined`, with a vector of limits or None."""
    from pyggml.backends.cpu.native.maths import ACTIVATIONS

    if limit is not None:
        gate, up = at_most(e, gate, limit), limited(e, up, e.b.fneg(limit), limit)
    return e.b.fmul(ACTIVATIONS[act](e, gate), up)


def limited(e: Any, x: Any, low: Any, high: Any) -> Any:
    """x between two limits. NaN stays NaN."""
    return at_most(e, e.b.select(e.b.fcmp_ordered("<", x, low), low, x), high)


def at_most(e: Any, x: Any, high: Any) -> Any:
    """min(x, high). NaN stays NaN."""
    return e.b.select(e.b.fcmp_ordered(">", x, high), high, x)
