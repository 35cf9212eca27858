"""The place and the graph of two_places.py, new for every test."""

from __future__ import annotations

import pytest
from two_places import B, Host, Model

from pyggml import backends


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """What computes on the place B."""
    made = Host()
    monkeypatch.setattr(backends.get("null", int(B.partition(":")[2])), "host", made)
    return made


@pytest.fixture
def model() -> Model:
    return Model()
