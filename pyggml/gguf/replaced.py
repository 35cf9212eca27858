"""Files that appear, or replace an older file, when they are complete.

The data goes to a temporary file .NAME.RANDOM.tmp in the same directory. Its writer holds a lock on
it, which the kernel drops when the process dies. A process id in the name would not do: ids are
reused.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replaced(target: Path, nbytes: int) -> Iterator[BinaryIO]:
    """A new file for `nbytes`, written by `put`, which gets the name `target` when the block ends.

    If the block fails, the file is removed, and `target` is as before; the files of killed
    processes are removed the next time. Errors, before anything is written: OSError if the disk has
    too little space; FileExistsError if `target` is a folder or a device.
    """
    _remove_abandoned(target)
    _check_room(target, nbytes)
    parts: list[Path] = []
    try:
        with _open_part(target, parts) as file:
            yield file
            parts[-1].replace(target)
    except BaseException:  # an interrupt can come at any line, also while the file is opened
        for part in parts:
            with suppress(OSError):
                part.unlink()
        raise


def put(file: BinaryIO, data: Any) -> int:
    """Write all of `data` and return its size. A raw file may write less at each call."""
    view = memoryview(data)
    if not view.nbytes:
        return 0  # memoryview cannot cast a shape with a 0
    view = view.cast("B")
    done = 0
    while done < len(view):
        done += file.write(view[done:])
    return done


def _open_part(target: Path, parts: list[Path]) -> BinaryIO:
    """A new locked file in the directory of `target`. Its name is the last that `parts` gets."""
    while True:
        parts.append(target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp"))
        file = parts[-1].open("xb", buffering=0)
        try:
            _lock(file)
        except BlockingIOError:  # another writer took it for abandoned and is removing it
            file.close()
            continue
        except OSError:
            return file  # no locks on this file system, so _remove_abandoned removes nothing
        if parts[-1].exists():
            return file
        file.close()


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary files of killed writers of `target`."""
    pattern = f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.tmp"
    for name in glob.glob(pattern, root_dir=target.parent):
        part = target.with_name(name)
        with suppress(OSError), part.open("rb") as file:
            _lock(file)
            part.unlink()


def _lock(file: BinaryIO) -> None:
    """Lock the file. BlockingIOError if another process has the lock, OSError if locks are
    unavailable.
    """
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _check_room(target: Path, total: int) -> None:
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "exists and is not a regular file", str(target))
    free = shutil.disk_usage(target.parent).free
    if total > free:
        problem = f"{total:,} bytes needed, {free:,} free on the disk"
        raise OSError(errno.ENOSPC, problem, str(target))
