"""Packages of extras, imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pyggml.errors import MissingPackageError


def package(name: str, purpose: str, extra: str = "text") -> Any:
    """The module `name`. MissingPackageError names the extra if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        raise MissingPackageError(
            f"{purpose} needs the package {top!r} ({error}); install the extra {extra!r}: "
            f'pip install "pyggml[{extra}]"'
        ) from error
