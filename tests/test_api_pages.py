"""The API pages: missing docstrings are reported, and docstrings become HTML."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import pyggml as gg
from tools import api_pages

ROOT = Path(__file__).parent.parent


def test_every_public_name_has_a_docstring() -> None:
    modules = map(import_module, api_pages.MODULES)
    assert [name for module in modules for name in api_pages.undocumented(module)] == []


def test_a_name_without_a_docstring_is_found() -> None:
    module = ModuleType("pyggml.sample")

    def silent() -> None: ...

    silent.__module__ = "pyggml.sample"
    module.silent = silent  # type: ignore[attr-defined]
    module.relu = gg.relu  # type: ignore[attr-defined]
    assert list(api_pages.undocumented(module)) == ["pyggml.sample", "pyggml.sample.silent"]


def test_a_docstring_keeps_its_layout() -> None:
    assert api_pages.as_html("a < b\n  y  [n, `m`]") == "a &lt; b\n  y  [n, <code>m</code>]"


@pytest.mark.skipif(find_spec("pdoc") is None, reason="needs pdoc (make docs)")
def test_pages_are_written_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "api_pages.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    page = (tmp_path / "pyggml.html").read_text()
    assert 'id="rope_ext"' in page and "Rotate pairs of each" in page
    shutil.rmtree(tmp_path)
