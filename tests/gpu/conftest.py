"""Tests that need a GPU: `python -m pytest -m gpu tests/gpu`.

Tests without fixtures run in a second process. If a kernel ends this process or loses the GPU, only
that test fails, and the next one starts a new process. So pytest's own process never uses the GPU.
Tests that start processes themselves take a fixture (`options` or `record_property`) and run in
pytest's process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import pytest

from pyggml.backends.processors import n_processors
from tests.gpu.away import Answer, Process

HERE = Path(__file__).parent
AWAY = Process()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu", "tests on a GPU (pytest -m gpu tests/gpu)")
    group.addoption("--gpu-jobs", type=int, help="processes for the grid (default: all cores)")
    group.addoption("--gpu-quick", action="store_true", help="use the small grid")
    group.addoption(
        "--gpu-seconds", type=float, metavar="S", help="time limit of the grid (default: 270)"
    )
    group.addoption(
        "--gpu-sanitize", type=float, metavar="S", help="time of each sanitizer (default: 60)"
    )


@dataclass(frozen=True)
class Options:
    """How much to test, and in how many processes."""

    jobs: int
    quick: bool
    seconds: float
    sanitize: float


@pytest.fixture
def options(pytestconfig: pytest.Config) -> Options:
    get = pytestconfig.getoption  # without this file at startup, there are no such options
    return Options(
        jobs=get("gpu_jobs", None) or n_processors(),
        quick=get("gpu_quick", False),
        seconds=get("gpu_seconds", None) or 270,
        sanitize=get("gpu_sanitize", None) or 60,
    )


@pytest.fixture(autouse=True)
def poisoned_arena() -> None:
    """Replaces the fixture for the host: a GPU's arena is not poisoned. Guarded runs and
    compute-sanitizer find reads of uninitialized memory."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test without fixtures in the other process."""
    params = pyfuncitem.callspec.params if hasattr(pyfuncitem, "callspec") else {}
    if set(signature(pyfuncitem.obj).parameters) - set(params):
        return None
    answer: Answer = AWAY.call(pyfuncitem.obj, **params)
    if answer.status == "skip":
        pytest.skip(answer.value)
    if answer.status == "fail":
        pytest.fail(answer.value, pytrace=False)
    return True


@pytest.fixture(scope="session", autouse=True)
def away() -> Iterator[None]:
    yield
    AWAY.close()
