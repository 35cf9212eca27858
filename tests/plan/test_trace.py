"""Traces: their events, and what two readers that are not ours make of them.

`perfetto` follows the rules of Perfetto's importer of JSON (src/trace_processor/importers/json in
its sources). `devtools` is the trace engine of an installed Chromium itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.base import Kernels
from pyggml.runtime.profile import Phases, Profile, Timing
from tests.page.browser import Browser, executable

CHROMIUM = executable()
X = np.ones((4, 8), np.float32)


def timing(**changes: Any) -> Timing:
    row = Timing(
        "y = relu(x)", "relu", "y", None, "f32 [8, 4]", "numpy", 0, "", Kernels(("relu",)),
        seconds=2e-6, flops=100.0, nbytes=4000.0,
    )  # fmt: skip
    return replace(row, **changes)


@pytest.fixture(scope="module")
def profile() -> Profile:
    """Two layers on two devices, with a copy between them."""
    h = gg.input("x", ne=(8, 4))
    for il in range(2):
        w = gg.constant(np.eye(8, dtype=np.float32), name=f"blk.{il}.w.weight")
        h = gg.label(gg.relu(gg.mul_mat(w, h)), f"l_out-{il}")
    y = gg.label(gg.soft_max(h), 'a label with "quotes", <tags> and \u00e9')
    plan = gg.compile({"y": y}, backends=["null:0", "numpy"], pins={"blk.1": "numpy"})
    return plan.profile({"x": X}, 2)


def events(trace: dict[str, Any], phase: str) -> Iterator[dict[str, Any]]:
    return (event for event in trace["traceEvents"] if event["ph"] == phase)


def test_a_trace_has_devices_copies_and_the_host(profile: Profile, tmp_path: Path) -> None:
    profile.write_trace(tmp_path / "out.json")
    trace = json.loads((tmp_path / "out.json").read_text())
    assert trace == json.loads(json.dumps(profile.trace()))
    names = [e["args"]["name"] for e in events(trace, "M")]
    assert names[:2] == ["host", "run"] and {"null:0", "numpy", "copies to it"} <= {*names}
    steps = list(events(trace, "X"))
    assert [e["name"] for e in steps[:3]] == ["upload", "issue", "wait"]
    assert [e["name"] for e in steps[3:]] == [row.text for row in profile.rows]
    for event, row in zip(steps[3:], profile.rows):
        assert event["dur"] == pytest.approx(row.seconds * 1e6, abs=1e-3)
        assert event["args"]["line"] == row.line and __file__ in row.line
    copies = {e["tid"] for e in steps if e["cat"] == "transfer"}
    assert copies and not copies & {e["tid"] for e in steps if e["cat"] not in ("transfer", "host")}


def test_a_split_starts_after_those_it_waits_for() -> None:
    rows = (
        timing(seconds=5e-6),
        timing(place="null:0", split=1, seconds=1e-6),
        timing(place="null:0", split=2, seconds=1e-6),
        timing(split=3, seconds=1e-6),
    )
    profile = Profile(rows, Phases(2e-6, 9e-6, 0), waits=((), (), (0,), (1,)))
    starts = [e["ts"] for e in events(profile.trace(), "X")][3:]
    assert starts == [3.0, 3.0, 8.0, 8.0]


# -- Perfetto -------------------------------------------------------------------------------------

#: (process, track) -> (name, start, end) of each slice, in nanoseconds.
Tracks = dict[tuple[str, str], list[tuple[str, int, int]]]


def perfetto(text: str) -> Tracks:
    """What Perfetto's importer keeps of a trace; AssertionError where it would drop an event.

    - Old versions take "displayTimeUnit" for the unit of all times.
    - pid and tid are u32. A thread is known by its tid alone, and tid 0 is an idle processor.
    - "M" gives names, which are texts that are not empty.
    - "X" needs "ts" and "dur", in microseconds; they are rounded to nanoseconds. Slices of a thread
      are sorted by their starts, and equal starts keep their order. One that ends after the slice
      around it is misplaced.
    - "name" and "cat" are texts. In "args", null is skipped.
    """
    trace = json.loads(text)
    assert text[0] == "{" and "displayTimeUnit" not in trace
    processes: dict[int, str] = {}
    threads: dict[int, tuple[int, str]] = {}
    slices: dict[int, list[tuple[str, int, int]]] = {}
    for event in trace["traceEvents"]:
        pid, tid, name = event["pid"], event["tid"], event["name"]
        assert 0 < pid < 2**32 and 0 < tid < 2**32 and isinstance(name, str) and name
        if event["ph"] == "M":
            label = event["args"]["name"]
            assert isinstance(label, str) and label and name in ("process_name", "thread_name")
            if name == "process_name":
                processes[pid] = label
            else:
                assert tid not in threads, "two threads of one number"
                threads[tid] = pid, label
            continue
        assert event["ph"] == "X" and isinstance(event["cat"], str)
        assert all(value is not None for value in event["args"].values())
        start, length = round(1000 * event["ts"]), round(1000 * event["dur"])
        assert start >= 0 and length >= 0 and threads[tid][0] == pid
        slices.setdefault(tid, []).append((name, start, start + length))
    tracks: Tracks = {}
    for tid, spans in slices.items():
        pid, label = threads[tid]
        spans.sort(key=lambda span: span[1])
        for (_, _, end), (_, start, _) in pairwise(spans):
            assert end <= start, "our steps follow one another; none is inside another"
        tracks[processes[pid], label] = spans
    return tracks


def expected(profile: Profile) -> Tracks:
    tracks: Tracks = {("host", "run"): []}
    for event in events(profile.trace(), "X"):
        start, end = round(1000 * event["ts"]), round(1000 * (event["ts"] + event["dur"]))
        if event["cat"] == "host":
            tracks["host", "run"].append((event["name"], start, end))
            continue
        row = next(row for row in profile.rows if row.text == event["name"])
        assert end - start == round(1e9 * row.seconds)
        track = "copies to it" if row.op == "transfer" else "steps"
        tracks.setdefault((row.place, track), []).append((event["name"], start, end))
    return tracks


def test_perfetto_keeps_every_step(profile: Profile, tmp_path: Path) -> None:
    profile.write_trace(tmp_path / "out.json")
    tracks = perfetto((tmp_path / "out.json").read_text())
    assert {*tracks} == {("host", "run"), ("null:0", "steps"), ("numpy", "steps"),
                         ("numpy", "copies to it")}  # fmt: skip
    assert tracks == expected(profile)


def test_steps_of_no_time_and_of_fractions_of_a_nanosecond_do_not_overlap() -> None:
    rows = tuple(timing(text=f"step {i}", seconds=i * 0.3e-9) for i in range(40))
    profile = Profile(rows, Phases(1.2e-9, 0.4e-9, 0))
    assert perfetto(json.dumps(profile.trace())) == expected(profile)


# -- Chromium -------------------------------------------------------------------------------------

#: Reads a trace with the engine behind the Performance panel.
ENGINE = """
(async () => {
  const engine = await import('devtools://devtools/bundled/models/trace/trace.js');
  const model = engine.TraceModel.Model.createWithAllHandlers();
  await model.parse(%s.traceEvents, {});
  const data = model.parsedTrace(0).data;
  const tracks = [];
  for (const [pid, process] of data.Renderer.processes) {
    for (const thread of process.threads.values()) {
      tracks.push([data.Meta.processNames.get(pid).args.name, thread.name,
        thread.entries.map((e) => [e.name, Math.round(1000 * e.ts),
          Math.round(1000 * (e.ts + e.dur))])]);
    }
  }
  const { min, max } = data.Meta.traceBounds;
  return [tracks, Math.round(1000 * min), Math.round(1000 * max)];
})()
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_devtools_of_chromium_read_every_step(profile: Profile) -> None:
    assert CHROMIUM is not None
    browser = Browser(CHROMIUM)
    try:
        browser.call("Page.navigate", url="devtools://devtools/bundled/devtools_app.html")
        for _ in range(100):
            if browser.run("document.readyState + location.protocol") == "completedevtools:":
                break
            time.sleep(0.1)
        rows, start, end = browser.run(ENGINE % json.dumps(profile.trace()))
    finally:
        browser.close()
    tracks = {(place, track): [(n, s, e) for n, s, e in spans] for place, track, spans in rows}
    assert tracks == expected(profile)
    spans = [span for track in tracks.values() for span in track]
    assert (start, end) == (min(s for _, s, _ in spans), max(e for _, _, e in spans))
