"""The commands that install what the CUDA backend needs, in a clone of the repository or a
wheel."""

from __future__ import annotations

import sys
from pathlib import Path

from pyggml.extras import from_clone, install_command

#: The folder that contains tools/: the top of a clone, or the installed package.
_TOP = Path(__file__).resolve().parents[3]


def package(name: str) -> str:
    """The command that installs one package."""
    build = f", or if pip cannot build it, {build_pycuda()}" if name == "pycuda" else ""
    return f"pip install {name}{build}"


def build_pycuda() -> str:
    """The command that builds pycuda if pip cannot: it has no wheel and needs a CUDA toolkit."""
    if from_clone():
        return "sh tools/build_pycuda.sh"
    return f"sh {_TOP / 'tools' / 'build_pycuda.sh'} {sys.executable} ."


def everything() -> str:
    """The command that installs everything that may be missing."""
    make = "make cuda, or " if from_clone() else ""
    return f"{make}{install_command('cuda')}; if pip cannot build pycuda, {build_pycuda()}"
