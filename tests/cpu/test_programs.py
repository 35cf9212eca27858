"""Programs and their threads: errors, interrupts, loops, several callers, forks."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml.backends.cpu.backend import FAMILIES
from pyggml.backends.cpu.moe import PLAIN_SUMS
from pyggml.backends.cpu.native.program import WORDS, Program
from pyggml.backends.step import LoopStep
from pyggml.errors import DeviceError, IdError

rng = np.random.default_rng(0)
Array = NDArray[Any]


def normal(*shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def test_an_id_past_the_end_stops_the_program() -> None:
    """The rows before it stay as they were, and the next run works."""
    cache = gg.state("cache", "f16", ne=(32, 4))
    rows, ids = gg.input("rows", "f32", ne=(32, 2)), gg.input("ids", "i32", ne=(2,))
    handle = gg.set_rows(cache, rows + rows, ids)
    store = gg.Store()
    plan = gg.compile({"y": gg.cast(handle, dtype="f32")}, backends=["cpu"], store=store)
    x = normal(2, 32)
    with pytest.raises(IdError, match=r"set_rows\(.*id 4 is past the end: there are 4"):
        plan.run(rows=x, ids=np.array([1, 4], np.int32))
    assert not store.read("cache").any()
    plan.run(rows=x, ids=np.array([1, -1], np.int32))
    want = np.zeros((4, 32), np.float16)
    want[1] = x[0] + x[0]
    assert np.array_equal(store.read("cache"), want)


def test_plans_run_from_several_threads() -> None:
    """The threads of the pool are shared; each caller gets its own results."""
    weights = [normal(64, 256) for _ in range(4)]
    x = normal(3, 256)
    results: dict[int, list[Array]] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        b = gg.input("b", "f32", ne=(256, 3))
        y = gg.mul_mat(gg.constant(weights[i], dtype="q8_0"), b)
        plan = gg.compile({"y": gg.silu(y)}, backends=["cpu"])
        results[i] += [plan.run(b=x)["y"] for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, got in results.items():
        y = x @ weights[i].T
        assert len(got) == 50 and all(np.array_equal(got[0], other) for other in got)
        np.testing.assert_allclose(got[0], y / (1 + np.exp(-y)), atol=1)


def test_calls_say_where_the_next_products_weights_are() -> None:
    """Waiting threads fetch them; after the last product there are none."""
    program, zeros = Program(), (0,) * len(PLAIN_SUMS.types)
    for reads in (None, None, (4096, 100), None, (8192, 64), None):
        program.add(PLAIN_SUMS, *zeros, **({"reads": reads} if reads else {}))
    program.pack()
    words = (ctypes.c_int64 * (WORDS * len(program))).from_address(program.address)
    table = np.array(words).reshape(-1, WORDS)
    next_, last, none = [4096, 4196], [8192, 8256], [0, 0]
    assert table[:, 3:].tolist() == [next_, next_, last, last, none, none]


def test_a_budget_gives_the_same_values() -> None:
    """Loops run their bodies by the same kernels, piece by piece."""
    q = gg.input("q", "f32", ne=(64, 400, 4))
    k, v = (gg.input(name, "f16", ne=(64, 96, 4)) for name in "kv")
    scores = gg.soft_max_ext(gg.mul_mat(k, q), scale=0.125)
    y = gg.mul_mat(gg.cont(gg.transpose(v)), scores)
    y = gg.silu(gg.rms_norm(y, eps=1e-5))
    inputs = {"q": normal(4, 400, 64)}
    inputs |= {name: normal(4, 96, 64).astype(np.float16) for name in "kv"}
    whole = gg.compile({"y": y}, backends=["cpu"])
    cut = gg.compile({"y": y}, backends=["cpu"], amb=0.3)
    assert any(isinstance(step, LoopStep) for step in cut.steps)
    np.testing.assert_allclose(cut.run(inputs)["y"], whole.run(inputs)["y"], atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["semaphores", "pipes"])
def test_threads_wait_awake_and_then_sleep(way: str) -> None:
    """Programs that find them awake, asleep or falling asleep; in the end all of them sleep."""
    program = f"""
import time, threading
from pathlib import Path
import numpy as np
from pyggml.backends.cpu.moe import SUMS
from pyggml.backends.cpu.native import pool as pools, sleep
from pyggml.backends.cpu.native.program import Program
from pyggml.backends.host_memory import address_of

pools.sleep, pool = sleep.{way}, pools.pool
x, weights, out = np.ones((8, 4), np.float32), np.ones(8, np.float32), np.zeros((8, 4), np.float32)
program = Program()
for _ in range(3):
    program.add(SUMS, address_of(out), 16, address_of(x), 0, 16, address_of(weights), 0, 4, 4, 1, 8)
program.pack()
for turn in range(2000):
    out[:] = 0
    pool().run(program, more=turn % 3 > 0)
    assert np.array_equal(out, x)
    if turn % 7 == 0:
        time.sleep(turn % 5 * 4e-4)
pool().run(program, more=True)
ids = [t.native_id for t in threading.enumerate() if t.name.startswith("pyggml-cpu")]
def state(i):
    return Path(f"/proc/self/task/{{i}}/stat").read_text().rsplit(")")[1].split()[0]
while any(state(i) != "S" for i in ids):
    time.sleep(0.01)
print(len(ids), "threads sleep")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(gg.__file__).parent.parent,
        env={**os.environ, "PYGGML_THREADS": "4"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "3 threads sleep", done.stderr


def test_an_interrupt_while_threads_start() -> None:
    """The next run starts those that are missing, and none twice."""
    program = """
import threading, time
import numpy as np
from pyggml.backends.cpu.moe import SUMS
from pyggml.backends.cpu.native.pool import Pool
from pyggml.backends.cpu.native.program import Program
from pyggml.backends.host_memory import address_of

x, weights, out = np.ones((8, 4), np.float32), np.ones(8, np.float32), np.zeros((8, 4), np.float32)
program = Program()
for _ in range(3):
    program.add(SUMS, address_of(out), 16, address_of(x), 0, 16, address_of(weights), 0, 4, 4, 1, 8)
program.pack()
start = threading.Thread.start
for last in range(1, 4):
    pool, count = Pool(4), 0

    def interrupted(thread):
        global count
        count += 1
        start(thread)
        if count == last:
            raise KeyboardInterrupt

    threading.Thread.start = interrupted
    try:
        pool.run(program)
    except KeyboardInterrupt:
        pass
    for _ in range(100):
        out[:] = 0
        pool.run(program)
        assert np.array_equal(out, x)
while threading.active_count() > 10:  # those that are too many end
    time.sleep(0.01)
print(threading.active_count() - 1, "threads")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(gg.__file__).parent.parent,
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.strip() == "9 threads", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    x = gg.input("x", "f32", ne=(64, 64))
    plan = gg.compile({"y": gg.rms_norm(x, eps=0.0)}, backends=["cpu"])
    array = normal(64, 64)
    want = plan.run(x=array)["y"]
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(plan.run(x=array)["y"], want) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_profiled_steps_are_those_of_the_plan() -> None:
    x = gg.input("x", "f32", ne=(64, 64))
    y = gg.soft_max(gg.silu(gg.rms_norm(x, eps=0.0)) + x)
    plan = gg.compile({"y": y}, backends=["cpu"])
    array = normal(64, 64)
    want = plan.run(x=array)["y"]
    rows = plan.profile(x=array).rows
    assert len(rows) == len(plan.steps) == 4 and all(row.seconds > 0 for row in rows)
    assert np.array_equal(plan.run(x=array)["y"], want)


def test_an_unknown_index() -> None:
    with pytest.raises(DeviceError, match="only one host"):
        gg.compile({"y": gg.input("x", "f32", ne=(4,)) + 1}, backends=["cpu:1"])


def test_every_file_with_kernels_is_imported() -> None:
    folder = Path(gg.__file__).parent / "backends" / "cpu"
    files = [path for path in folder.rglob("*.py") if "\n@kernel(" in path.read_text()]
    names = {".".join(path.relative_to(folder).with_suffix("").parts) for path in files}
    assert names <= set(FAMILIES) and len(names) >= 8


def test_a_cached_start_does_not_import_numba(tmp_path: Path) -> None:
    """The second process finds all object code; a damaged file is compiled again."""
    program = """
import sys, numpy as np, pyggml as gg
x = gg.input("x", "f32", ne=(64, 3))
plan = gg.compile({"y": gg.rms_norm(x, eps=0.0)}, backends=["cpu"])
assert np.allclose(plan.run(x=np.ones((3, 64), np.float32))["y"], 1)
print("numba" in sys.modules)
"""

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=Path(gg.__file__).parent.parent,
            env={**os.environ, "PYGGML_CACHE": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert [run(), run()] == ["True", "False"]
    files = list((tmp_path / "cpu").iterdir())
    assert files and all(file.suffix == ".o" for file in files)
    files[0].write_bytes(files[0].read_bytes()[:-1])
    assert [run(), run()] == ["True", "False"]


def test_without_numba_plans_are_made_but_not_bound() -> None:
    program = """
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
import numpy as np, pyggml as gg
from importlib import util
find = util.find_spec
util.find_spec = lambda name: None if name in ("numba", "llvmlite") else find(name)
from pyggml import backends
assert backends.on_host() == "numpy" and "cpu" not in backends.preferred()
x = gg.input("x", "f32", ne=(64, 3))
plan = gg.compile({"y": gg.rms_norm(x, eps=0.0)}, backends=["cpu"])
try:
    plan.bind()
except gg.DeviceError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(gg.__file__).parent.parent, capture_output=True,
        text=True,
    )  # fmt: skip
    assert "needs numba: not installed" in done.stdout, done.stderr
    assert 'pip install -e ".[cpu]"' in done.stdout


def test_a_thread_that_is_held_up_leaves_before_the_next_program() -> None:
    """With more threads than processors some always are. A program that stops must not let them
    run the kernels after the one that stopped it, not even while the next program runs."""
    program = """
import numpy as np, pyggml as gg
cache = gg.state("cache", "f32", ne=(32, 4))
rows, ids = gg.input("rows", "f32", ne=(32, 2)), gg.input("ids", "i32", ne=(2,))
y = gg.silu(gg.set_rows(cache, rows + rows, ids))
plan = gg.compile({"y": y}, backends=["cpu"])
x = np.ones((2, 32), np.float32)
want = plan.run(rows=x, ids=np.array([1, 2], np.int32))["y"]
for _ in range(300):
    try:
        plan.run(rows=x, ids=np.array([1, 4], np.int32))
    except gg.IdError:
        pass
    assert np.array_equal(plan.run(rows=x, ids=np.array([1, 2], np.int32))["y"], want)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(gg.__file__).parent.parent,
        env={**os.environ, "PYGGML_THREADS": "4"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "done", done.stderr
