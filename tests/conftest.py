"""Every test runs with the graph verifier on, and fills arenas with NaN before each run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

# Threads of BLAS spin while they wait, in each process that runs tests. NumPy reads this on import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from pyggml import backends
from pyggml.errors import DeviceError
from pyggml.runtime.execution import Execution

os.environ["PYGGML_VERIFY"] = "1"
settings.register_profile("core", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("core")


@cache
def lacks(marker: str) -> str:
    """What this machine lacks for tests with the marker, or "" if they can run."""
    try:
        if marker == "kernels":
            compiler = import_module("pyggml.backends.cuda.device.compiler")
            compiler.nvrtc(), compiler.include_folders()
        if marker == "gpu":
            driver = import_module("pyggml.backends.cuda.device.driver").driver()
            return "" if driver.Device.count() else "there is no GPU"
    except DeviceError as error:
        return str(error)
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests whose marker needs something this machine lacks.

    Under `-m MARKER`, which selects just those tests, they fail instead.
    """
    for marker in ("kernels", "gpu"):
        if item.get_closest_marker(marker) and lacks(marker):
            if item.config.getoption("markexpr") == marker:
                pytest.fail(f"-m {marker}: {lacks(marker)}", pytrace=False)
            pytest.skip(f"{marker}: {lacks(marker)}")


#: Looked up here: an import inside a run would be a long time to be interrupted in.
NULL_DEVICES: list[Any] = [backends.get("null", i) for i in range(10)]


@pytest.fixture(autouse=True)
def poisoned_arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill arenas with 0xFF bytes (NaN in float types), so that reads of unwritten results show."""
    run, devices = Execution._run, NULL_DEVICES

    def poisoned(self: Execution, *args: Any, **named: Any) -> Any:
        # Not behind runs that are still queued: another device may read what they have computed.
        if not any(len(device.queue) for device in devices):
            for buffer in self.arenas.values():
                memory = buffer if isinstance(buffer, np.ndarray) else getattr(buffer, "data", None)
                if memory is not None:  # memory on a GPU cannot be written from here
                    memory[:] = 0xFF
        return run(self, *args, **named)

    monkeypatch.setattr(Execution, "_run", poisoned)
    yield
