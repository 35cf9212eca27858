"""The host and the model of two_places.py, new for every test."""

from __future__ import annotations

import pytest
from two_places import B, Host, Model

from pyggml import backends


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """The backend that computes on the place B."""
    replacement = Host()
    monkeypatch.setattr(backends.get("null", int(B.partition(":")[2])), "host", replacement)
    return replacement


@pytest.fixture
def model() -> Model:
    return Model()
