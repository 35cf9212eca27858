"""Packages of extras, imported when they are used, and the commands that install them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from pyggml.errors import MissingPackageError

#: The top of a clone. In an installed package, the folder that contains it.
_TOP = Path(__file__).resolve().parents[1]


def from_clone() -> bool:
    """Whether this is a clone (or an unpacked sdist), not a package installed by pip."""
    return (_TOP / "pyproject.toml").is_file()


def install_command(extra: str) -> str:
    """The command that installs an extra of pyggml."""
    return f'pip install -e ".[{extra}]"' if from_clone() else f'pip install "pyggml[{extra}]"'


def package(name: str, purpose: str, extra: str = "text") -> Any:
    """The module `name`. MissingPackageError names the extra if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        raise MissingPackageError(
            f"{purpose} needs the package {top!r} ({error}); install the extra {extra!r}: "
            f"{install_command(extra)}"
        ) from error
