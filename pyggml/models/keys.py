"""Look-ups of an architecture's keys that check type and range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from pyggml.errors import GGUFError

_MAX_SIZE = 1 << 31


class Keys:
    """The keys of a file (`GGUFFile.fields`) that begin with the name of the architecture.

    A look-up takes the key without that prefix. It raises a GGUFError that names the key if it is
    missing, has the wrong type or is out of range.

    lookups  every key looked up so far
    """

    def __init__(self, architecture: str, fields: Mapping[str, Any]) -> None:
        self.architecture, self.fields = architecture, fields
        self.lookups: set[str] = set()
        if (name := fields.get("general.architecture")) != architecture:
            raise GGUFError(f"key 'general.architecture': {name!r}, must be {architecture!r}")

    def fail(self, key: str, problem: str) -> NoReturn:
        raise GGUFError(f"key '{self.architecture}.{key}': {problem}")

    def get(self, key: str, type_: type, default: Any) -> Any:
        self.lookups.add(key)
        value = self.fields.get(f"{self.architecture}.{key}", default)
        if value is None:
            self.fail(key, "is missing")
        if type(value) is not type_:
            self.fail(key, f"must be {type_.__name__}, got {type(value).__name__}")
        return value

    def has(self, key: str) -> bool:
        self.lookups.add(key)
        return f"{self.architecture}.{key}" in self.fields

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = _MAX_SIZE
    ) -> int:
        value: int = self.get(key, int, default)
        if not least <= value <= most:
            self.fail(key, f"{value}, must be {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite float greater than 0; `zero` allows 0 too."""
        value: float = self.get(key, float, default)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            limit = "not negative" if zero else "greater than 0"
            self.fail(key, f"{value}, must be finite and {limit}")
        return value

    def equal(self, key: str, expected: int, reason: str) -> None:
        """Check a redundant key against the value that other keys imply."""
        if (value := self.get(key, int, expected)) != expected:
            self.fail(key, f"{value}, must be {expected} because of {reason}")
