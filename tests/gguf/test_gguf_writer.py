"""Writing: both readers read it back; invalid input; files that remain after a failure."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml import gguf
from pyggml.dtypes import dtype
from pyggml.errors import DTypeError, GGUFError
from pyggml.gguf.synth import DRAWN, drawn_type, fitting_type, random_tensor

FIELDS: dict[str, Any] = {
    "general.architecture": "x", "u": 7, "n": -7, "big": 1 << 40, "f": 0.5, "yes": True,
    "u16": np.uint16(3), "f64": np.float64(0.1), "tokens": ["a", "", "é"], "scores": np.arange(3.0),
}  # fmt: skip


def of(array: np.ndarray[Any, Any], name: str = "t") -> gguf.Tensor:
    return gguf.Tensor(name, dtype("f32"), array.shape[::-1], lambda: [array.astype(np.float32)])


def test_round_trip_through_both_readers(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tensors = [random_tensor(name, dtype(name), (256, 3, 2), std=0.02) for name in DRAWN]
    size = gguf.write(path, FIELDS, tensors)
    assert path.stat().st_size == size
    theirs = reference.GGUFReader(path)
    with gguf.open(path) as file:
        for key, value in FIELDS.items():
            ours, other = file.fields[key], theirs.get_field(key)
            assert other is not None
            np.testing.assert_array_equal(ours, value)  # type: ignore[arg-type]
            np.testing.assert_array_equal(other.contents(), value)
        assert [t.name for t in theirs.tensors] == list(file.tensors)
        for tensor in theirs.tensors:
            info = file.tensors[tensor.name]
            assert tensor.tensor_type == info.dtype.ggml_id
            assert tuple(tensor.shape.tolist()) == info.ne
            assert tensor.data.tobytes() == file.array(tensor.name).tobytes()


values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=5),
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z.]{1,9}", fullmatch=True), values, max_size=6))
def test_any_fields_come_back(tmp_path_factory: pytest.TempPathFactory, fields: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fields.gguf"
    gguf.write(path, fields, [])
    with gguf.open(path) as file:
        back = {
            k: list(v) if isinstance(v, gguf.StringArray) else v for k, v in file.fields.items()
        }
    assert back == fields and [type(v) for v in back.values()] == [type(v) for v in fields.values()]


def test_header_only_describes_everything(tmp_path: Path) -> None:
    array = np.ones((4, 8), np.float32)
    gguf.write(tmp_path / "whole", {"k": 1}, [of(array)])
    size = gguf.write(tmp_path / "head", {"k": 1}, [of(array)], header_only=True)
    assert (tmp_path / "whole").read_bytes()[:size] == (tmp_path / "head").read_bytes()
    with gguf.open(tmp_path / "whole") as whole:
        with gguf.open(tmp_path / "head", allow_missing_data=True) as head:
            assert dict(whole.tensors) == dict(head.tensors)
        np.testing.assert_array_equal(whole.array("t"), array)


@pytest.mark.parametrize(
    ("fields", "tensors", "error"),
    [
        ({"": 1}, [], GGUFError),
        ({"k": 1 << 64}, [], DTypeError),
        ({"k": object()}, [], DTypeError),
        ({"k": [1, 2]}, [], DTypeError),
        ({"k": np.zeros((2, 2))}, [], DTypeError),
        ({"k": np.float16(1)}, [], DTypeError),
        ({"general.alignment": 64}, [], GGUFError),
        ({}, [of(np.ones(8)), of(np.ones(8))], GGUFError),
        ({}, [of(np.ones(8), "n" * 64)], GGUFError),
        ({}, [of(np.ones((1, 1, 1, 1, 8)))], GGUFError),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: Path, fields: Any, tensors: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        gguf.write(tmp_path / "x.gguf", fields, tensors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), SystemExit(143)])
def test_failure_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")

    def chunks() -> Iterator[np.ndarray[Any, Any]]:
        yield np.zeros(8, np.float32)
        assert len(list(tmp_path.iterdir())) == 2
        raise error

    with pytest.raises(type(error)):
        gguf.write(path, {}, [gguf.Tensor("t", dtype("f32"), (16,), chunks)])
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"] and path.read_bytes() == b"old"


# Starts writing argv[1], prints a line, and waits to be killed.
_WRITER = """
import sys, time
import numpy as np
from pyggml import gguf
from pyggml.dtypes import dtype

def chunks():
    yield np.zeros(1024, np.float32)
    print("writing", flush=True)
    time.sleep(60)

gguf.write(sys.argv[1], {}, [gguf.Tensor("t", dtype("f32"), (2048,), chunks)])
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing `path`."""
    command = [sys.executable, "-c", _WRITER, str(path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
    return writer


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "a[b]*.gguf", tmp_path / "other.gguf"
    writers = [start_writer(path), start_writer(path), start_writer(other)]
    for writer in writers:
        writer.kill()
        writer.wait()
    assert len(list(tmp_path.iterdir())) == 3
    gguf.write(path, {}, [of(np.ones(8))])
    others = [p.name for p in tmp_path.iterdir() if p != path]
    assert len(others) == 1 and others[0].startswith(".other.gguf.")
    gguf.write(other, {}, [])
    assert {p.name for p in tmp_path.iterdir()} == {path.name, other.name}


def test_files_of_a_running_process_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = start_writer(path)
    try:
        gguf.write(path, {}, [of(np.ones(8))])
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        writer.kill()
        writer.wait()


def test_a_process_id_that_repeats(tmp_path: Path) -> None:
    """In a container it is often 1."""
    path = tmp_path / "x.gguf"
    (tmp_path / f".x.gguf.{os.getpid()}.tmp").touch()
    gguf.write(path, {}, [of(np.ones(8))])
    assert path.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", fail)
    leftover = tmp_path / ".x.gguf.0123abcd.tmp"
    leftover.touch()
    gguf.write(tmp_path / "x.gguf", {}, [of(np.ones(8))])
    assert {p.name for p in tmp_path.iterdir()} == {"x.gguf", leftover.name}


def test_wrong_amount_of_data(tmp_path: Path) -> None:
    for size in (7, 9):
        tensor = gguf.Tensor("t", dtype("f32"), (8,), lambda n=size: [np.zeros(n, np.float32)])
        with pytest.raises(GGUFError, match="'t': expected 32 bytes, got"):
            gguf.write(tmp_path / "x.gguf", {}, [tensor])
    assert not list(tmp_path.iterdir())


def test_larger_than_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50))
    with pytest.raises(OSError, match="50 free"):
        gguf.write(tmp_path / "x.gguf", {}, [of(np.ones(8))])
    assert not list(tmp_path.iterdir())


def test_target_that_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="not a regular file"):
        gguf.write(tmp_path, {}, [])
    with pytest.raises(FileNotFoundError):
        gguf.write(tmp_path / "no" / "x.gguf", {}, [])


# --- random weights ------------------------------------------------------------------------------


def decoded(name: str, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if name in ("f32", "f16"):
        return raw.astype(np.float64)
    qtype = reference.GGMLQuantizationType[name.upper()]
    return reference.dequantize(raw.view(np.uint8), qtype).astype(np.float64)


@pytest.mark.parametrize("name", DRAWN)
def test_random_weights_have_the_requested_spread(name: str) -> None:
    type_ = dtype(name)
    tensor = random_tensor("t", type_, (256, 1024), std=0.02, seed=3)
    chunks = list(tensor.chunks())
    again, other = random_tensor("t", type_, (256, 1024), std=0.02, seed=4), list(tensor.chunks())
    raw = np.concatenate(chunks).reshape(-1)
    np.testing.assert_array_equal(raw, np.concatenate(other).reshape(-1))
    assert (raw != np.concatenate(list(again.chunks())).reshape(-1)).mean() > 0.5
    shape = (-1, type_.nbytes) if type_.kind == "block" else (-1,)
    values = decoded(name, raw.reshape(shape))
    assert abs(np.sqrt(np.mean(values**2)) / 0.02 - 1) < 0.02
    assert abs(values.mean()) < 0.02 * 0.02
    assert np.abs(values).max() < 6 * 0.02


def test_types_that_fit() -> None:
    q4, iq4 = dtype("q4_K"), dtype("iq4_nl")
    assert [fitting_type(q4, ne0).name for ne0 in (512, 128, 33)] == ["q4_K", "q8_0", "f16"]
    assert fitting_type(iq4, 128) is iq4
    with pytest.raises(DTypeError, match="choose from"):
        drawn_type("q8_1")
