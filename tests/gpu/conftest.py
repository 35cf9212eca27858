"""What runs on a GPU: `python -m pytest -m gpu tests/gpu`.

A test that takes no fixture runs in a process of its own, which the next tests share: one whose
kernel ends the process, or loses the GPU, fails alone. So pytest's process never uses the GPU, and
tests that start processes themselves take a fixture: `options` or `record_property`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import pytest

from tests.gpu.away import Answer, Process

HERE = Path(__file__).parent
AWAY = Process()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu", "tests on a GPU (pytest -m gpu tests/gpu)")
    group.addoption("--gpu-jobs", type=int, help="processes of the grid (default: all cores)")
    group.addoption("--gpu-quick", action="store_true", help="the small grid")
    group.addoption(
        "--gpu-seconds", type=float, metavar="S", help="within which the grid ends (default: 270)"
    )
    group.addoption(
        "--gpu-sanitize", type=float, metavar="S", help="of each sanitizer (default: 60)"
    )


@dataclass(frozen=True)
class Options:
    """How much to do, and in how many processes."""

    jobs: int
    quick: bool
    seconds: float
    sanitize: float


@pytest.fixture
def options(pytestconfig: pytest.Config) -> Options:
    get = pytestconfig.getoption  # of no value where this file was not read before the options
    return Options(
        jobs=get("gpu_jobs", None) or os.cpu_count() or 1,
        quick=get("gpu_quick", False),
        seconds=get("gpu_seconds", None) or 270,
        sanitize=get("gpu_sanitize", None) or 60,
    )


@pytest.fixture(autouse=True)
def poisoned_arena() -> None:
    """A GPU's arena cannot be written to from here: guarded runs and compute-sanitizer find what
    is read before it is written."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that takes nothing but parameters in the other process."""
    given = pyfuncitem.callspec.params if hasattr(pyfuncitem, "callspec") else {}
    if set(signature(pyfuncitem.obj).parameters) - set(given):
        return None
    answer: Answer = AWAY.call(pyfuncitem.obj, **given)
    if answer.status == "skip":
        pytest.skip(answer.value)
    if answer.status == "fail":
        pytest.fail(answer.value, pytrace=False)
    return True


@pytest.fixture(scope="session", autouse=True)
def away() -> Iterator[None]:
    yield
    AWAY.close()
