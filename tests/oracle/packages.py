"""Packages that oracle tests fetch; a test is skipped where there is no network."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import fetch


def package(name: str) -> Path:
    """The folder with the files of a package of tools/fetch.py."""
    try:
        return fetch.fetch(name)
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"cannot fetch {fetch.PACKAGES[name].requirement}: {error}")
