"""Real processes under mpiexec: equal bits, one error for every failure, and nothing left over."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pyggml as gg
from pyggml.models.presets import preset
from pyggml.models.synth import synth

ROOT = Path(__file__).parents[2]
MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
PYGGML = [sys.executable, "-m", "pyggml"]
PROGRAM = [sys.executable, "-m", "tests.spmd.program"]
#: Seconds in which all processes must end after one has failed.
SOON = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spmd")
    synth(folder / "tiny.gguf", preset("tiny"))
    synth(folder / "other.gguf", preset("tiny"), seed=1)
    return folder


def start(*words: str | Path, reads: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, words)), cwd=ROOT, text=True, start_new_session=True,
        stdin=subprocess.PIPE if reads else subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def ended(process: subprocess.Popen[str], text: str | None = None) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(text, timeout=60)
    except subprocess.TimeoutExpired:
        for pid in descendants(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        pytest.fail("it hangs")
    return process.returncode, out, err


def run(*words: str | Path, text: str | None = None) -> tuple[int, str, str]:
    """Run a command that reads `text`."""
    return ended(start(*words, reads=text is not None), text)


def model(path: Path, *words: str) -> list[str]:
    """The arguments of a command that continues a text."""
    return ["run", "-m", str(path), "-p", "hello", "--temp", "0", "-n", "8", *words]


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if text[0] != "Z":
            parents.setdefault(int(text[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found[1:]


def rank_of(pid: int) -> int | None:
    text = Path(f"/proc/{pid}/environ").read_bytes()
    match = re.search(rb"\0PMI_RANK=(\d+)", text)
    return int(match[1]) if match else None


def check_failed(status: int, out: str, wanted: int) -> None:
    """mpiexec ended with the status of the rank that failed, and nothing was printed.

    It kills all processes once the connection to one is closed. If it has not seen by then that
    this one has ended, it tells of a kill instead.
    """
    if status == signal.SIGKILL:
        assert "BAD TERMINATION" in out and "EXIT CODE: 9" in out, out
    else:
        assert (status, out) == (wanted, "")


def check_one_error(err: str, *parts: str) -> None:
    lines = [line for line in err.splitlines() if not line.startswith("usage: ")]
    assert len(lines) == 1, err
    for part in ("error: ", *parts):
        assert part in lines[0], err


# -- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["numpy", "null"])
def test_the_same_bits_as_one_process(folder: Path, place: str) -> None:
    status, _, err = run(MPIEXEC, "-n", "2", *PROGRAM, "graph", str(folder), place)
    assert status == 0, err
    parts = [np.load(folder / f"{rank}.npz") for rank in (0, 1)]
    places = [f"{place}:0", f"{place}:1"]
    with gg.load(folder / "tiny.gguf", backends=places, shard="auto") as whole:
        session = whole.session(n_ctx=64, n_batch=16)
        logits = session.forward(range(40), "all")
        tokens = list(session.generate([4], 4))
        for part in parts:
            np.testing.assert_array_equal(part["logits"], logits)
            assert part["tokens"].tolist() == tokens
            for name in session.store.homes:
                np.testing.assert_array_equal(part[name], session.store.read(name, raw=True))
        session.load(folder / "saved.gguf")
        devices = list(session.store.arenas)
    assert [part["arenas"].tolist() for part in parts] == [[device] for device in devices]


def test_the_command(folder: Path) -> None:
    words = model(folder / "tiny.gguf", "--seed", "3", "--temp", "1")
    one = run(*PYGGML, *words, "--backend", "null:0,null:1", "--shard", "auto")
    assert one == (0, one[1], "") and one[1].strip()
    assert run(MPIEXEC, "-n", "2", *PYGGML, *words, "--backend", "null") == one
    assert run(*PYGGML, *words, "--backend", "null", "--nproc", "2") == one


def test_a_random_seed_is_that_of_all(folder: Path) -> None:
    words = ["run", "-m", folder / "tiny.gguf", "-p", "a", "-n", "4", "--nproc", "2"]
    status, out, err = run(*PYGGML, *words, "--shard", "layers=2", "--backend", "numpy")
    assert status == 0 and out and not err


def test_other_commands(folder: Path) -> None:
    """Rank 0 plans; bench and perplexity run on all."""
    path = str(folder / "tiny.gguf")
    words = ["--backend", "null:0,null:1", "--shard", "auto", "-c", "256", "--json"]
    one = run(*PYGGML, "plan", "-m", path, *words)
    assert one[0] == 0 and run(MPIEXEC, "-n", "2", *PYGGML, "plan", "-m", path, *words) == one
    words = ["-p", "4", "-n", "2", "-r", "1", "--backend", "null", "-o", "csv", "--nproc", "2"]
    status, out, err = run(*PYGGML, "bench", "-m", path, *words)
    assert status == 0 and not err and len(out.splitlines()) == 3 and '"null:0,null:1"' in out
    text = folder / "text"
    text.write_text("abc " * 100)
    words = ["perplexity", "-m", path, "-f", str(text), "-c", "64", "--backend"]
    one = run(*PYGGML, *words, "null:0,null:1", "--shard", "auto")
    assert one[0] == 0 and run(*PYGGML, *words, "null", "--nproc", "2") == one


def test_logits(folder: Path) -> None:
    words = ["logits", "-m", folder / "tiny.gguf", "--tokens", "1,2,3,4,5", "-o"]
    on = ["--backend", "null:0,null:1", "--shard", "auto"]
    assert run(*PYGGML, *words, folder / "one.npy", *on)[0] == 0
    status, out, err = run(*PYGGML, *words, folder / "two.npy", "--backend", "null", "--nproc", "2")
    assert status == 0 and not err and out.count("float32") == 1
    np.testing.assert_array_equal(np.load(folder / "one.npy"), np.load(folder / "two.npy"))
    status, out, err = run(
        *PYGGML, *words, folder / "none" / "x.npy", "--backend", "null", "--nproc", "2"
    )
    assert status == 1 and not out
    check_one_error(err, "none")


def test_sweep(folder: Path) -> None:
    words = ["sweep", "-m", folder / "tiny.gguf", "-c", "16", "-ub", "8", "-n", "1", "-o", "csv"]
    status, out, err = run(*PYGGML, *words, "--backend", "null", "--nproc", "2")
    assert status == 0 and not err and len(out.splitlines()) == 3


def test_chat(folder: Path) -> None:
    """Each line is a message to all; the end of the input ends all."""
    words = ["chat", "-m", folder / "tiny.gguf", "--temp", "0", "-n", "3", "--backend"]
    text = "Hello\nAgain\n"
    one = run(*PYGGML, *words, "null:0,null:1", "--shard", "auto", text=text)
    assert one[0] == 0 and len(one[1].splitlines()) >= 2
    assert run(*PYGGML, *words, "null", "--nproc", "2", text=text) == one
    words[-1:] = ["-c", "64", "--backend"]
    status, _, err = run(*PYGGML, *words, "null", "--nproc", "2", text="long " * 99 + "\n")
    assert status == 1
    check_one_error(err, "do not fit")


# -- failures ---------------------------------------------------------------------------------


def test_another_file(folder: Path) -> None:
    (folder / "copy.gguf").write_bytes((folder / "tiny.gguf").read_bytes())
    two = [["-n", "1", *PYGGML, *model(folder / f"{name}.gguf")] for name in ("tiny", "other")]
    status, out, err = run(MPIEXEC, *two[0], ":", *two[1])
    check_failed(status, out, 1)
    check_one_error(err, "rank 1 has another model than rank 0", "a file of")
    two[1][-len(model(folder)) :] = model(folder / "copy.gguf")  # the same file at another path
    assert run(MPIEXEC, *two[0], ":", *two[1])[0] == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("version", "rank 1 has another model than rank 0: 'pyggml 0.1' instead of 'pyggml 0.0'"),
        ("memory", "rank 1: null:1 cannot allocate"),
        ("error", "rank 1: ValueError: not today"),
        ("plan", "rank 1 has another plan than rank 0: "),
        ("end", "rank 1 has ended, but rank 0 waits"),
    ],
)
def test_a_rank_that_differs_or_fails(folder: Path, change: str, why: str) -> None:
    words = model(folder / "tiny.gguf", "--backend", "null", "--temp", "1", "--top-k", "0")
    begin = time.monotonic()
    status, _, err = run(MPIEXEC, "-n", "2", *PROGRAM, change, *words)
    assert status in (1, signal.SIGKILL)  # as in check_failed, behind what rank 0 has printed
    check_one_error(err, why)
    assert time.monotonic() - begin < SOON


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (["-n", "6"], 1, "rank 1 has another command line than rank 0: 'n=6' instead of 'n=8'"),
        (["--bad"], 2, "unrecognized arguments: --bad"),
        (["-m", "none.gguf"], 1, "rank 1: none.gguf: No such file"),
    ],
)
def test_other_options_on_a_rank(folder: Path, words: list[str], status: int, why: str) -> None:
    same = model(folder / "tiny.gguf")
    found = run(MPIEXEC, "-n", "1", *PYGGML, *same, ":", "-n", "1", *PYGGML, *same, *words)
    check_failed(*found[:2], status)
    check_one_error(found[2], why)


@pytest.mark.parametrize(
    ("n", "words", "status", "why"),
    [
        ("1", ["--backend", "null:0,null:1", "--shard", "auto"], 1, "1 process runs a plan for 2"),
        ("2", ["--bad"], 2, "unrecognized arguments: --bad"),
        ("2", ["-m", "none.gguf"], 1, "none.gguf: No such file"),
        ("2", ["--nproc", "3"], 2, "--nproc 3, but mpiexec has started 2"),
        ("2", ["--shard", "layers=3"], 1, "needs 3 devices of one kind"),
    ],
)
def test_the_same_error_everywhere(
    folder: Path, n: str, words: list[str], status: int, why: str
) -> None:
    found = run(MPIEXEC, "-n", n, *PYGGML, *model(folder / "tiny.gguf"), *words)
    check_failed(*found[:2], status)
    check_one_error(found[2], why)


def test_threads_are_for_one_process(folder: Path) -> None:
    words = ["bench", "-m", folder / "tiny.gguf", "-t", "1,2", "--backend", "null"]
    status, out, err = run(MPIEXEC, "-n", "2", *PYGGML, *words)
    check_failed(status, out, 2)
    check_one_error(err, "-t starts a process for each number of threads")


def test_an_uncaught_error_of_a_script() -> None:
    status, _, err = run(MPIEXEC, "-n", "2", *PROGRAM, "uncaught")
    assert status in (1, signal.SIGKILL) and err.count("ValueError: not today") >= 1


#: The tests look for processes there.
PROC = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def running(
    folder: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A command that takes long, once it has printed something; and all of its processes."""
    words = ["run", "-m", folder / "tiny.gguf", "-p", "hello", "--temp", "0", "-n", "4000"]
    how = [*PYGGML, *words, "--nproc", "2"]
    if request.param == "mpiexec":
        how = [MPIEXEC, "-n", "2", *PYGGML, *words]
    process = start(*how, "--backend", "numpy")
    assert process.stdout is not None and process.stdout.read(1)
    pids = descendants(process.pid)
    yield process, pids
    for pid in pids:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)


def check_nothing_left(process: subprocess.Popen[str], pids: list[int], begin: float) -> None:
    assert len(pids) >= 3 and time.monotonic() - begin < SOON
    time.sleep(0.3)
    left = [pid for pid in pids if alive(pid)]
    assert not left


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@PROC
@pytest.mark.parametrize("running", ["nproc"], indirect=True)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(running: tuple[subprocess.Popen[str], list[int]], rank: int) -> None:
    process, pids = running
    (pid,) = [pid for pid in pids if rank_of(pid) == rank]
    begin = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    status, _, err = ended(process)
    assert status == 1
    check_one_error(err, f"rank {rank} (process {pid}) was killed by SIGKILL")
    check_nothing_left(process, pids, begin)


@PROC
@pytest.mark.parametrize("running", ["mpiexec"], indirect=True)
def test_a_killed_rank_under_mpiexec(running: tuple[subprocess.Popen[str], list[int]]) -> None:
    """mpiexec reports it, with the number of the process."""
    process, pids = running
    (pid,) = [pid for pid in pids if rank_of(pid) == 1]
    begin = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    status, out, err = ended(process)
    assert status == signal.SIGKILL and f"PID {pid} RUNNING" in out and not err.strip()
    check_nothing_left(process, pids, begin)


@PROC
@pytest.mark.parametrize("running", ["nproc", "mpiexec"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt(
    running: tuple[subprocess.Popen[str], list[int]], number: signal.Signals
) -> None:
    process, pids = running
    begin = time.monotonic()
    process.send_signal(number)
    status, _, err = ended(process)
    lines = [line for line in err.splitlines() if line.strip() and "[mpiexec@" not in line]
    assert status == 128 + number and lines == ["pyggml: interrupted"] * (number == signal.SIGINT)
    check_nothing_left(process, pids, begin)


@PROC
@pytest.mark.parametrize("running", ["nproc"], indirect=True)
def test_a_killed_launcher(running: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, pids = running
    begin = time.monotonic()
    process.kill()
    ended(process)
    check_nothing_left(process, pids, begin)
