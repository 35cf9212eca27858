"""Markers: a test is skipped if the machine lacks something, but fails if -m selects it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests import conftest


def setup(marker: str, markexpr: str) -> str:
    """The outcome of the setup of a test with this marker, under `pytest -m markexpr`."""
    item: Any = Mock()
    item.get_closest_marker = lambda name: name == marker
    item.config.getoption = {"markexpr": markexpr}.get
    try:
        conftest.pytest_runtest_setup(item)
    except pytest.skip.Exception as skip:
        return f"skipped: {skip}"
    except pytest.fail.Exception as fail:
        return f"failed: {fail}"
    return "runs"


@pytest.mark.parametrize("marker", ["kernels", "gpu"])
def test_something_is_missing(monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    monkeypatch.setattr(conftest, "lacks", lambda name: "no compiler" if name == marker else "")
    assert setup(marker, "") == f"skipped: {marker}: no compiler"
    assert setup(marker, "not oracle") == f"skipped: {marker}: no compiler"
    assert setup(marker, marker) == f"failed: -m {marker}: no compiler"
    assert setup("oracle", "") == setup("", marker) == "runs"


@pytest.mark.parametrize("marker", ["kernels", "gpu"])
def test_nothing_is_missing(monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    monkeypatch.setattr(conftest, "lacks", lambda name: "")
    assert setup(marker, "") == setup(marker, marker) == "runs"


def test_every_marker_is_declared(pytestconfig: pytest.Config) -> None:
    declared = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    assert {"oracle", "kernels", "stub", "gpu"} <= declared


def test_pytest_needs_no_plugin() -> None:
    """The options in pyproject.toml are pytest's own; pytest-benchmark is for benchmarks/ only."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
