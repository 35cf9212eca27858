"""The default number of threads: processors that the process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyggml.backends.processors import n_processors, n_threads
from pyggml.errors import ShapeError


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def machine(folder: Path, groups: str, **files: str) -> Path:
    """A root folder; `files` are below sys/fs/cgroup, with __ for / and _DOT_ for dots."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 16), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1),
     ("9900000 100000", 16), ("", 16), ("0 0", 16)],
)  # fmt: skip
def test_a_container_of_version_2(tmp_path: Path, quota: str, expected: int) -> None:
    assert n_processors(machine(tmp_path, "0::/\n", cpu_DOT_max=quota)) == expected


def test_groups_above_count(tmp_path: Path) -> None:
    files = {"a__cpu_DOT_max": "300000 100000", "a__b__cpu_DOT_max": "max 100000"}
    assert n_processors(machine(tmp_path, "0::/a/b\n", **files)) == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", 16), ("400000", 4)])
def test_a_container_of_version_1(tmp_path: Path, quota: str, expected: int) -> None:
    groups = "9:name=systemd:/x\n2:cpuacct,cpu:/x\n0::/\n"
    files = {"cpu__x__cpu_DOT_cfs_quota_us": quota, "cpu__x__cpu_DOT_cfs_period_us": "100000"}
    assert n_processors(machine(tmp_path, groups, **files)) == expected


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert n_processors(tmp_path) == 16


def test_the_variable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYGGML_THREADS", "5")
    assert n_threads() == 5
    monkeypatch.setenv("PYGGML_THREADS", "none")
    with pytest.raises(ShapeError, match="PYGGML_THREADS"):
        n_threads()
