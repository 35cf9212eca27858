"""The values of options: types for argparse, and the error for options that do not fit together."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import TypeVar

from pyggml import dtypes
from pyggml.errors import DTypeError, PyggmlError
from pyggml.runtime import places as all_places

T = TypeVar("T")


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
def regex(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise DTypeError(f"{text!r} is not a regular expression: {error}") from None
    return text
