"""How many threads to use: PYGGML_THREADS, or the processors that this process may use.

Those are the ones in its affinity mask, within the limits of its containers.

A container with `--cpus=2` sees all processors of the machine, and Linux stops its threads for the
rest of each period once they have used up its share. So more threads than that only wait for each
other. The limit is in the files of its control group, version 2 or 1, and of all groups above.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path, PurePosixPath

from pyggml.errors import ShapeError


def n_threads() -> int:
    """PYGGML_THREADS, else the number of processors that this process may use.

    Errors: ShapeError if PYGGML_THREADS is not a whole number of at least 1.
    """
    text = os.environ.get("PYGGML_THREADS")
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise ShapeError(f"PYGGML_THREADS={text!r} must be a whole number of at least 1")
        return int(text)
    return n_processors()


def n_processors(root: Path = Path("/")) -> int:
    """The processors that the process may use, at least 1; a limit of 1.5 counts as 2.

    root  where `proc` and `sys` are
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min([count, *map(ceil, _limits(root))]))


def _limits(root: Path) -> Iterator[float]:
    """The limits of the process's control groups, in processors."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = PurePosixPath(path)
        for each in (group, *group.parents):
            folder = mount / str(each).lstrip("/")
            if controllers:
                names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
                words = [_text(folder / name).strip() for name in names]
            else:
                words = _text(folder / "cpu.max").split()
            if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
                yield int(words[0]) / int(words[1])


def _text(path: Path) -> str:
    """The content of a file; empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
