"""Markers: a test skips itself where what it needs is missing, and fails where it was asked for."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from tests import conftest


def setup(marker: str, markexpr: str) -> str:
    """What happens before a test with the marker under `pytest -m markexpr`."""
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
def test_what_is_missing(monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    monkeypatch.setattr(conftest, "lacks", lambda name: "it is not here" if name == marker else "")
    assert setup(marker, "") == f"skipped: {marker}: it is not here"
    assert setup(marker, "not oracle") == f"skipped: {marker}: it is not here"
    assert setup(marker, marker) == f"failed: -m {marker}: it is not here"
    assert setup("oracle", "") == setup("", marker) == "runs"


@pytest.mark.parametrize("marker", ["kernels", "gpu"])
def test_nothing_is_missing(monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    monkeypatch.setattr(conftest, "lacks", lambda name: "")
    assert setup(marker, "") == setup(marker, marker) == "runs"


def test_every_marker_is_declared(pytestconfig: pytest.Config) -> None:
    declared = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    assert {"oracle", "kernels", "stub", "gpu"} <= declared
