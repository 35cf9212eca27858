"""Hyperparameters as dataclass fields, each declared with its GGUF key.

One declaration serves to read a file's keys, to check them, to know which keys the architecture
has, and to write them:

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Llama(Architecture):
        n_head: int = key("attention.head_count")
        n_head_kv: int = key("attention.head_count_kv", default=same("attention.head_count"))
        rope: Rope = group(Rope)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, get_args, get_type_hints

import numpy as np

from pyggml.errors import GGUFError

MAX_SIZE = 1 << 31
Default = Callable[["Keys"], Any]


class Keys:
    """The keys of a file (`GGUFFile.fields`) that begin with the name of the architecture.

    A look-up takes the key without that prefix. It raises a GGUFError that names the key if it is
    missing, has the wrong type or is out of range.

    lookups  every key looked up so far; `check_keys` (known.py) rejects a file's other keys
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
        self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE
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

    def word(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        value: str = self.get(key, str, default)
        if value not in choices:
            self.fail(key, f"{value!r}, must be one of {', '.join(choices)}")
        return value

    def each(self, key: str, n: int, type_: type) -> tuple[Any, ...]:
        """The value for each of `n` layers: one for all of them, or an array of at least `n`."""
        self.lookups.add(key)
        value = self.fields.get(f"{self.architecture}.{key}")
        if value is None:
            self.fail(key, "is missing")
        if type(value) is type_:
            return (value,) * n
        kinds = "f" if type_ is float else "iu"
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            self.fail(key, f"must be {type_.__name__} or an array, got {type(value).__name__}")
        if value.size < n:
            self.fail(key, f"has {value.size} values, must have one for each of {n} layers")
        return tuple(type_(number) for number in value[:n])

    def equal(self, key: str, expected: int, reason: str) -> None:
        """Check a redundant key against the value that other keys imply."""
        if (value := self.get(key, int, expected)) != expected:
            self.fail(key, f"{value}, must be {expected} because of {reason}")


# -- declarations -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """How a field is read and written.

    name     the key without the architecture's prefix
    default  the value if the key is missing, or a function of the file's keys; absent: the key is
             required, unless the field's type allows None
    older    its name in old files, used if `name` is missing
    least, most  limits of an integer;  zero  a float may be 0;  choices  the words allowed
    rare     `written` leaves out the default
    """

    name: str
    default: Any = dataclasses.MISSING
    older: str = ""
    least: int = 1
    most: int = MAX_SIZE
    zero: bool = False
    rare: bool = False
    choices: tuple[str, ...] = ()

    def read(self, keys: Keys, type_: Any) -> Any:
        optional = type(None) in get_args(type_)
        if optional:
            if not keys.has(self.name):
                return None
            (type_,) = (t for t in get_args(type_) if t is not type(None))
        default = self.default
        if self.older:
            default = dataclasses.replace(self, name=self.older, older="").read(keys, type_)
        if default is dataclasses.MISSING:
            default = None
        elif callable(default):
            keys.lookups.add(self.name)
            default = None if keys.has(self.name) else default(keys)
        if type_ is int:
            return keys.integer(self.name, default, least=self.least, most=self.most)
        if type_ is float:
            return keys.number(self.name, default, zero=self.zero)
        if self.choices:
            return keys.word(self.name, self.choices, default)
        return keys.get(self.name, type_, default)


def key(name: str, default: Any = dataclasses.MISSING, **limits: Any) -> Any:
    """A dataclass field with the GGUF key `name`; the arguments are those of `Key`."""
    rule = Key(name, default, **limits)
    plain = dataclasses.MISSING if callable(default) else default
    return dataclasses.field(default=plain, metadata={"key": rule})


def group(type_: type) -> Any:
    """A dataclass field whose value is a dataclass of keys, `type_`."""
    return dataclasses.field(metadata={"group": type_})


def same(name: str) -> Default:
    """The default of a key: the value of another key, an integer."""
    return lambda keys: keys.integer(name)


def read(type_: type, keys: Keys) -> dict[str, Any]:
    """Field name -> value of the fields of a dataclass that have keys."""
    hints, values = get_type_hints(type_), {}
    for field in dataclasses.fields(type_):
        if "group" in field.metadata:
            values[field.name] = hints[field.name](**read(field.metadata["group"], keys))
        elif "key" in field.metadata:
            values[field.name] = field.metadata["key"].read(keys, hints[field.name])
    return values


def written(config: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of the fields of a dataclass that have keys, except None and rare defaults.

    Other defaults are written, because llama.cpp has no default for some of them.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "group" in field.metadata:
            yield from written(value)
        elif "key" in field.metadata and value is not None:
            rule = field.metadata["key"]
            if not rule.rare or value != rule.default:
                yield rule.name, value
