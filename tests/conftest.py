"""Every test runs with the graph verifier on and with arenas full of NaN before each run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from pyggml.runtime.plan import Plan

os.environ["PYGGML_VERIFY"] = "1"
settings.register_profile("core", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("core")


@pytest.fixture(autouse=True)
def poisoned_arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A result that is read before it is written is NaN (0xFF bytes in every type)."""
    run = Plan.run

    def poisoned(self: Plan, *inputs: Any, **named: Any) -> dict[str, np.ndarray]:
        self.bind()
        for arena in self.store.arenas.values():
            own = isinstance(arena.buffer, np.ndarray)
            memory = arena.buffer if own else getattr(arena.buffer, "data", None)
            if memory is not None:  # a GPU's cannot be written to from here
                memory[:] = 0xFF
        return run(self, *inputs, **named)

    monkeypatch.setattr(Plan, "run", poisoned)
    yield
