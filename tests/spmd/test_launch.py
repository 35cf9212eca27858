"""Parts of the launcher that need no processes."""

from __future__ import annotations

import io
import os
import sys
from threading import Thread

import pytest

import pyggml as gg
from pyggml import backends
from pyggml.cli import launch, main
from pyggml.passes.stages import Shard
from pyggml.runtime import mpi
from pyggml.runtime.ranks import Ranks
from tests.spmd.threads import ThreadTransport, Wires

BANNER = launch._BANNER + b"\n=   PID 17 RUNNING AT host\n=   EXIT CODE: 9\n==="


def relayed(*chunks: bytes) -> tuple[bytes, bytes]:
    """What is passed on, and the banner."""
    read, write = os.pipe()

    def send() -> None:
        for chunk in chunks:
            os.write(write, chunk)
        os.close(write)

    thread = Thread(target=send)
    thread.start()
    target = io.BytesIO()
    with os.fdopen(read, "rb", buffering=0) as source:
        banner = launch._relay(source, target)
    thread.join()
    return target.getvalue(), banner


@pytest.mark.parametrize("step", [1, 7, 50, 1000])
def test_the_banner_is_found_in_pieces(step: int) -> None:
    text = b"one\n\ntwo\n" + b"=" * 82 + b"\n=  BAD\n" + BANNER
    found = relayed(*(text[i : i + step] for i in range(0, len(text), step)))
    assert found == (text[: -len(BANNER)], BANNER)


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n====", b"\n" + b"=" * 83 + b"\n"])
def test_output_without_a_banner(end: bytes) -> None:
    assert relayed(b"a text" + end) == (b"a text" + end, b"")


def test_who_was_killed() -> None:
    assert launch._killed(BANNER, {17: 3}).startswith("rank 3 (process 17) was killed by SIGKILL (")
    assert launch._killed(BANNER, {}).startswith("process 17 was killed by SIGKILL")
    other = BANNER.replace(b"CODE: 9", b"CODE: 99")
    assert launch._killed(other, {17: 0}).startswith("rank 0 (process 17) ended with status 99")
    assert "BAD TERMINATION" in launch._killed(launch._BANNER, {})


def test_the_extra_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert main(["run", "-m", "none.gguf", "-p", "x", "--nproc", "2"]) == 1
    err = capsys.readouterr().err
    assert "--nproc needs mpiexec and mpi4py; install the extra 'mpi': pip install" in err


def test_one_process_needs_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for size in (None, "1"):
        if size is not None:
            monkeypatch.setenv("PMI_RANK", "0")
            monkeypatch.setenv("PMI_SIZE", size)
        mpi.join.cache_clear()
        ranks = gg.join()
        assert (ranks.rank, ranks.size, ranks.gather("x")) == (0, 1, ["x"])
        ranks.agree("plan", "x")
        assert ranks.together(lambda: 3) == 3
        ranks.leave()
    mpi.join.cache_clear()
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(gg.MissingPackageError, match=r"several processes.*extra 'mpi'"):
        gg.join()


def test_the_gpu_of_a_rank() -> None:
    """With one GPU on each of two machines, that of rank 1 is the first of its machine."""
    transport = ThreadTransport(Wires(2), 1)
    transport.local = 0
    devices = tuple(backends.get("cuda", i) for i in range(2))
    try:
        Ranks(transport).adopt(Shard({"rows": 2}, (1.0, 1.0), (1.0,), devices))
        assert [device.ordinal for device in devices] == [0, 0]
    finally:
        devices[1].ordinal = 1
