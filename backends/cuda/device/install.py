"""Commands that install what the CUDA backend needs, for a clone of the repository or a wheel."""

from __future__ import annotations

import sys
from pathlib import Path

#: The folder with tools/: the top of a clone, or the installed package.
_TOP = Path(__file__).resolve().parents[3]


def from_clone() -> bool:
    """Whether this is a clone (or an unpacked sdist), not a package that pip installed."""
    return (_TOP / "pyproject.toml").is_file()


def extra(name: str) -> str:
    """The command that installs an extra of pyggml, with the versions that it was tested with."""
    return f'pip install -e ".[{name}]"' if from_clone() else f'pip install "pyggml[{name}]"'


def package(name: str) -> str:
    """The command that installs one package."""
    build = f", or where pip cannot build it, {build_pycuda()}" if name == "pycuda" else ""
    return f"pip install {name}{build}"


def build_pycuda() -> str:
    """The command that builds pycuda where pip cannot: it has no wheel and wants a CUDA toolkit."""
    if from_clone():
        return "sh tools/build_pycuda.sh"
    return f"sh {_TOP / 'tools' / 'build_pycuda.sh'} {sys.executable} ."


def everything() -> str:
    """The command that installs all that may be missing."""
    one = "make cuda, or " if from_clone() else ""
    return f"{one}{extra('cuda')}; where pip cannot build pycuda, {build_pycuda()}"
