"""A profile as a Chrome trace, for Perfetto and the Performance panel of Chromium's DevTools.

The format is the "JSON Object Format" of the Trace Event Format: complete events ("X") with start
and duration in microseconds, and names of processes and threads as metadata ("M"). Each device is a
process with a track for its steps and one for copies to it; the host's process has a track for what
it does in a run: upload, issue, wait.

There is no `displayTimeUnit`. It is meant for the display, but some versions of Perfetto (and other
readers) take it for the unit of the times.

The durations are measured. The starts are drawn from them: a step starts when the step before it
on its device has ended, and a split when its copies have arrived and the splits that it waits for
have ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyggml.transfer import transfer

if TYPE_CHECKING:
    from pyggml.runtime.profile import Profile, Timing

Event = dict[str, Any]
#: Numbers of processes: the host, and the first device.
HOST, FIRST = 1, 2
#: Tracks of a device.
STEPS, COPIES = 0, 1
#: Nanoseconds before the first event: DevTools ignores the time 0.
START = 1000


def write(profile: Profile, path: Path) -> None:
    path.write_text(json.dumps(trace(profile)) + "\n", encoding="utf-8")


def trace(profile: Profile) -> dict[str, Any]:
    """The trace as a JSON object."""
    places = list(dict.fromkeys(row.place for row in profile.rows))
    return {
        "traceEvents": [*_names(places), *_host(profile), *_steps(profile, places)],
        "otherData": {"summary": profile.head()},
    }


def _tid(pid: int, track: int) -> int:
    """Different for all tracks: a reader may look for threads by this number alone. Number 0 is
    that of an idle processor."""
    return 10 * pid + track


def _names(places: list[str]) -> Iterator[Event]:
    yield _name("process_name", HOST, 0, "host")
    yield _name("thread_name", HOST, 0, "run")
    for pid, place in enumerate(places, FIRST):
        yield _name("process_name", pid, 0, place)
        yield _name("thread_name", pid, STEPS, "steps")
        yield _name("thread_name", pid, COPIES, "copies to it")


def _name(kind: str, pid: int, track: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": pid, "tid": _tid(pid, track), "args": {"name": name}}


def _host(profile: Profile) -> Iterator[Event]:
    start, phases = START, profile.phases
    for name in ("upload", "issue", "wait"):
        end = start + _ns(getattr(phases, name))
        yield _complete(name, "host", HOST, 0, start, end, {})
        start = end


def _steps(profile: Profile, places: list[str]) -> Iterator[Event]:
    """Events of all rows, split by split."""
    begin = START + _ns(profile.phases.upload)
    free = {place: begin for place in places}  # when a device has nothing to do
    ends: dict[int, int] = {}  # split -> its end
    by_split: dict[int, list[Timing]] = {}
    for row in profile.rows:
        by_split.setdefault(row.split, []).append(row)
    for split, rows in by_split.items():
        place, pid = rows[0].place, FIRST + places.index(rows[0].place)
        waits = profile.waits[split] if split < len(profile.waits) else ()
        at = max([free[place], *(ends.get(other, begin) for other in waits)])
        for row in rows:
            track, end = COPIES if row.op == transfer.name else STEPS, at + _ns(row.seconds)
            yield _complete(row.text, row.op, pid, track, at, end, _details(profile, row))
            at = end
        ends[split] = free[place] = at


def _ns(seconds: float) -> int:
    """Whole nanoseconds: with fractions, neighbours might overlap after a reader rounds them."""
    return round(seconds * 1e9)


def _details(profile: Profile, row: Timing) -> dict[str, Any]:
    """What Perfetto shows for a selected step."""
    details: dict[str, Any] = {
        "label": row.label, "op": row.op, "result": row.spec, "line": row.line,
        "kernels": str(row.kernels), "launches": row.launches,
        "bytes": int(row.nbytes), "flops": int(row.flops),
    }  # fmt: skip
    if row.layer is not None:
        details["layer"] = row.layer
    if row.seconds > 0:
        details["GB/s"] = round(row.nbytes / row.seconds / 1e9, 2)
        details["GFLOP/s"] = round(row.flops / row.seconds / 1e9, 2)
    share = profile.share(row)
    if share is not None:
        details["share of ceiling"] = round(share, 3)
    if row.kernels.why:
        details["not the fast kernel"] = row.kernels.why
    return details


def _complete(
    name: str, category: str, pid: int, track: int, start: int, end: int, args: Event
) -> Event:
    """An event from `start` to `end`, in nanoseconds."""
    return {
        "name": name, "cat": category, "ph": "X", "pid": pid, "tid": _tid(pid, track),
        "ts": start / 1000, "dur": (end - start) / 1000, "args": args,
    }  # fmt: skip
