"""The values of options: types for argparse, and the error for options that do not fit together."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any, TypeVar

from pyggml import dtypes
from pyggml.errors import DTypeError, PyggmlError
from pyggml.runtime import places as all_places

T = TypeVar("T")
#: Of `pyggml bench -o` and `pyggml sweep -o`.
FORMATS = ("md", "csv", "json", "jsonl")


class UsageError(PyggmlError):
    """The command line is wrong; the exit status is 2."""


@contextmanager
def wrong_usage() -> Iterator[None]:
    """Turn every pyggml error into a UsageError: around checks of arguments, before any work."""
    try:
        yield
    except PyggmlError as error:
        raise UsageError(str(error)) from error


def option(read: Callable[[str], T]) -> Callable[[str], T]:
    """`read` as a type for argparse, which prints the message of a PyggmlError."""

    def checked(text: str) -> T:
        try:
            return read(text)
        except PyggmlError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def by_first_name(add: Callable[..., Any]) -> Callable[..., Any]:
    """`add_argument`, which stores a value under the first name of its option: `args.ub` for
    `-ub` and `--ubatch-size`. argparse would take the long name."""

    def add_named(*names: str, **settings: Any) -> Any:
        return add(*names, dest=names[0].lstrip("-").replace("-", "_"), **settings)

    return add_named


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""
    limits = f"of at least {least}" if most is None else f"from {least} to {most:,}"

    def read(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() else -1
        if number < least or (most is not None and number > most):
            raise DTypeError(f"must be a whole number {limits}, got {text!r}")
        return number

    return option(read)


count, natural = whole(1), whole(0)
rows = whole(1, 2**31 - 1)  # positions are int32

#: `first[-last[+step]]` or `first-last*factor`.
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?", re.ASCII)
_MOST_VALUES = 1000


def numbers(least: int) -> Callable[[str], list[int]]:
    """Whole numbers from `least` on, as llama-bench reads them: 1,2,8 or 1-4 or 0-4096+1024 or
    128-2048*2."""

    def read(text: str) -> list[int]:
        values: list[int] = []
        for word in text.split(","):
            match = _RANGE.fullmatch(word)
            if match is None:
                raise DTypeError(f"must be numbers such as 1,2 or 0-8+2 or 1-8*2, got {text!r}")
            first, last = int(match[1]), int(match[2] or match[1])
            values += _range(first, last, match[3] or "+", int(match[4] or 1), word)
        if values and min(values) < least:
            raise DTypeError(f"must be whole numbers of at least {least}, got {text!r}")
        return values

    return option(read)


def _range(first: int, last: int, sign: str, step: int, word: str) -> Iterator[int]:
    if last < first or (sign == "+" and step < 1) or (sign == "*" and (step < 2 or first < 1)):
        raise DTypeError(f"{word!r} is not a range: it does not grow from {first} to {last}")
    if sign == "+" and (last - first) // step >= _MOST_VALUES:
        raise DTypeError(f"{word!r} is more than {_MOST_VALUES:,} numbers")
    while first <= last:
        yield first
        first = first + step if sign == "+" else first * step


def listed(read: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Values that `read` takes, separated by commas."""
    return lambda text: [read(word) for word in text.split(",")]


class Values(argparse.Action):
    """Collects the values of an option that is a list, also from several uses. The default is a
    list, too; the first use replaces it."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None
    ) -> None:
        old = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if old is self.default else [*old, *values])


@option
def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not (number > 0 and isfinite(number)):
        raise DTypeError(f"must be a number above 0, got {text!r}")
    return number


@option
def budget(text: str) -> float | None:
    """A number above 0; none or 0 is None."""
    return None if text in ("0", "none") else positive(text)


@option
def switch(text: str) -> str:
    """on or off; 1 and 0 are the same."""
    values = {"on": "on", "1": "on", "off": "off", "0": "off"}
    if text not in values:
        raise DTypeError(f"must be on or off, got {text!r}")
    return values[text]


@option
def read_ahead(text: str) -> bool | None:
    """auto, on or off."""
    values = {"auto": None, "on": True, "off": False}
    if text not in values:
        raise DTypeError(f"must be auto, on or off, got {text!r}")
    return values[text]


@option
def dtype(text: str) -> str:
    """The name of an element type."""
    return dtypes.dtype(text).name


@option
def place(text: str) -> str:
    """A place, such as cuda:0."""
    all_places.parse(text)
    return text


@option
def places(text: str) -> list[str]:
    """Places, separated by commas."""
    return [place(name) for name in text.split(",")]


@option
def shard(text: str) -> str | dict[str, int | tuple[float, ...]]:
    """auto, or CUT=N[,CUT=N..]; N is a number of devices, or their shares such as 3:1."""
    if text == "auto":
        return text
    cuts: dict[str, int | tuple[float, ...]] = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        try:
            shares = tuple(float(share) for share in value.split(":"))
        except ValueError:
            raise DTypeError(f"{text!r}: expected auto or CUT=N, such as heads=2,rows=2") from None
        cuts[name] = int(value) if value.isdecimal() else shares
    return cuts


@option
def pins(text: str) -> list[tuple[str, str]]:
    """(pattern, place) pairs of `REGEX=PLACE[,REGEX=PLACE..]`; a comma may be in a pattern."""
    pairs = []
    pair = ""
    for piece in text.split(","):
        pair += piece
        pattern, equal, name = pair.rpartition("=")
        if equal and pattern:
            pairs.append((regex(pattern), place(name)))
        pair = "" if equal else pair + ","
    if pair:
        raise DTypeError(f"{text!r}: expected REGEX=PLACE, such as exps=numpy")
    return pairs


@option
def pin_set(text: str) -> list[tuple[str, str]]:
    """Pairs as in `pins`, also separated by semicolons; none is no pair."""
    if text == "none":
        return []
    return [pair for part in text.split(";") for pair in pins(part)]


@option
def regex(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise DTypeError(f"{text!r} is not a regular expression: {error}") from None
    return text
