"""Reading valid files: ours, the gguf package's, split ones; how long their arrays live."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest

from pyggml import gguf, quants
from pyggml.dtypes import TYPES
from pyggml.errors import DTypeError, GGUFError, UnknownNameError
from pyggml.ops import constant
from tests.gguf.gguf_bytes import (
    ARCH,
    STRING,
    U32,
    array,
    build,
    every_kind,
    kv,
    tensor,
    text,
    u32,
    u64,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "x.gguf"
    target.write_bytes(every_kind())
    return target


def test_fields_are_python_values(path: Path) -> None:
    with gguf.open(path) as file:
        fields = file.fields
    assert file.version == 3 and file.complete
    assert fields["general.architecture"] == "test"
    assert [fields[f"k.{i}"] for i in (0, 1, 2, 3, 4, 5, 10, 11)] == [1] * 8
    assert fields["k.7"] is True
    assert type(fields["k.6"]) is type(fields["k.12"]) is float
    assert list(fields["tokens"]) == ["a", "", "é"] and fields["tokens"][-1] == "é"  # type: ignore[index,arg-type]
    assert fields["none"].shape == (0,)  # type: ignore[union-attr]
    for id_, element in {0: "u1", 5: "i4", 6: "f4", 7: "?", 12: "f8"}.items():
        values: Any = fields[f"a.{id_}"]
        assert values.dtype == element and values.tolist() == [0, 1]
        assert not values.flags.writeable


def test_version_2_reads_alike(tmp_path: Path) -> None:
    (tmp_path / "v2").write_bytes(every_kind(version=2))
    with gguf.open(tmp_path / "v2") as file:
        assert file.version == 2 and len(file.tensors) == 3


def test_arrays_are_read_only_views_in_numpy_shape(path: Path) -> None:
    with gguf.open(path) as file:
        plain, block, half = (file.array(name) for name in ("plain", "block", "half"))
    data = bytes(range(192))
    assert plain.dtype == np.float32 and plain.shape == (2, 4)
    assert block.dtype == np.uint8 and block.shape == (2, 34)
    assert half.dtype == np.uint16 and half.shape == (2, 2, 8)
    # The file is closed now; the map lives as long as its arrays.
    assert (plain.tobytes(), block.tobytes(), half.tobytes()) == (
        data[:32],
        data[32:100],
        data[128:],
    )
    with pytest.raises(ValueError, match="read-only"):
        plain[0, 0] = 1
    info = file.tensors["half"]
    assert (info.ne, info.shape, info.n_elements, info.nbytes) == ((8, 2, 2), (2, 2, 8), 32, 64)


def test_unknown_names_suggest(path: Path) -> None:
    with gguf.open(path) as file:
        with pytest.raises(UnknownNameError, match="did you mean plain"):
            file.array("plane")
        with pytest.raises(UnknownNameError, match=r"general\.architecture"):
            file.fields["general.architectur"]
        assert file.fields.get("nothing") is None and "nothing" not in file.tensors


def test_use_after_close(path: Path) -> None:
    file = gguf.open(path)
    file.close()
    file.close()
    with pytest.raises(GGUFError, match="closed"):
        file.array("plain")


def test_a_file_that_shrinks_is_an_error_not_a_signal(path: Path) -> None:
    with gguf.open(path) as file:
        os.truncate(path, os.path.getsize(path) - 64)
        assert file.array("plain").shape == (2, 4)
        with pytest.raises(GGUFError, match="half"):
            file.array("half")


def test_missing_data_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "h.gguf"
    path.write_bytes(every_kind()[:-64])
    with pytest.raises(GGUFError, match="allow_missing_data"):
        gguf.open(path)
    with gguf.open(path, allow_missing_data=True) as file:
        assert not file.complete and file.array("block").shape == (2, 34)
        with pytest.raises(GGUFError, match=r"'half'.*not in the file"):
            file.array("half")


def test_gaps_order_and_alignment_are_free(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    keys = [ARCH, kv("general.alignment", U32, u32(64))]
    rows = [tensor("late", (2,), offset=128), tensor("early", (2,), offset=0)]
    path.write_bytes(build(keys, rows, bytes(range(192)), alignment=64))
    with gguf.open(path) as file:
        assert file.array("late").tobytes() == bytes(range(128, 136))


def test_a_token_that_is_not_utf8_fails_when_used(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(build([array("tokens", STRING, 2, text("a") + text(b"\xff"))]))
    with gguf.open(path) as file:
        tokens: Any = file.fields["tokens"]
    assert len(tokens) == 2 and tokens.raw() == [b"a", b"\xff"]
    with pytest.raises(GGUFError, match=r"key 'tokens'.*not UTF-8"):
        tokens[0]


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "ref.gguf"
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((6, 64)).astype(np.float32)
    packed = reference.quantize(weights, reference.GGMLQuantizationType.Q8_0)
    writer = reference.GGUFWriter(path, "deepseek2")
    writer.add_block_count(27)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list([f"tok{i}" for i in range(50)])
    writer.add_token_types([1] * 50)
    writer.add_tensor("w", weights)
    writer.add_tensor("q", packed, raw_dtype=reference.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with gguf.open(path) as file:
        assert file.fields["deepseek2.block_count"] == 27
        assert list(file.fields["tokenizer.ggml.tokens"])[49] == "tok49"  # type: ignore[arg-type]
        np.testing.assert_array_equal(file.array("w"), weights)
        np.testing.assert_array_equal(file.array("q"), packed)
        assert file.tensors["q"].dtype.name == "q8_0"


@pytest.mark.parametrize("name", ["x.gguf", "y.gguf"])
def test_shapes_with_no_elements_or_no_dimensions(tmp_path: Path, name: str) -> None:
    """We read what gguf-py reads, from bytes of our own and from a file that we wrote."""
    path = tmp_path / name
    rows = [tensor("none", (0,)), tensor("rows", (4, 0), 0), tensor("q", (0, 3), 8),
            tensor("one", (), 0), tensor("last", (2,), 0, 32)]  # fmt: skip
    path.write_bytes(build(None, rows, np.arange(10, dtype="<f4").tobytes()))
    if name == "y.gguf":
        with gguf.open(tmp_path / "y.gguf") as file:
            tensors = [
                gguf.Tensor(t.name, t.dtype, t.ne, lambda name=t.name: [file.array(name)])
                for t in file.tensors.values()
            ]
            path = tmp_path / "ours.gguf"
            gguf.write(path, {"general.architecture": "x"}, tensors)
    with gguf.open(path) as file:
        arrays = {name: file.array(name) for name in file.tensors}
        sizes = {t.name: (t.n_elements, t.nbytes) for t in file.tensors.values()}
    assert {name: a.shape for name, a in arrays.items()} == {
        "none": (0,), "rows": (0, 4), "q": (3, 0), "one": (), "last": (2,),
    }  # fmt: skip
    assert arrays["one"] == 0 and arrays["last"].tolist() == [8, 9]
    assert sizes == {"none": (0, 0), "rows": (0, 0), "q": (0, 0), "one": (1, 4), "last": (2, 8)}
    for theirs in reference.GGUFReader(path).tensors:
        ours = arrays[theirs.name]
        assert (theirs.n_elements, theirs.n_bytes) == sizes[theirs.name]
        assert theirs.data.size == ours.size


FOREIGN = {
    4: "removed from ggml; convert", 36: "removed from ggml; convert", 42: "newer than this pyggml",
    137: "an ik_llama.cpp type", 511: "an ik_llama.cpp type",
}  # fmt: skip


@pytest.mark.parametrize("id_", FOREIGN)
def test_a_tensor_of_an_unknown_type_is_refused_on_use(tmp_path: Path, id_: int) -> None:
    path = tmp_path / "x.gguf"
    rows = [tensor("strange", (33, 2), id_), tensor("good", (8,), 0, 64)]
    path.write_bytes(build(None, rows, bytes(range(96))))
    with gguf.open(path) as file:
        assert file.complete and file.array("good").tobytes() == bytes(range(64, 96))
        info = file.tensors["strange"]
        assert (info.dtype.name, info.dtype.kind, info.ne) == (f"type {id_}", "unknown", (33, 2))
        with pytest.raises(GGUFError, match=rf"tensor 'strange': type {id_} .*{FOREIGN[id_]}"):
            file.array("strange")


@pytest.mark.parametrize("name", sorted(TYPES))
def test_tensors_of_every_type_are_read(tmp_path: Path, name: str) -> None:
    """Even types that cannot be decoded; using those in a graph is the error."""
    path, dtype = tmp_path / "x.gguf", TYPES[name]
    row = tensor("t", (256, 2), dtype.ggml_id)
    path.write_bytes(build(None, [row], bytes(dtype.tensor_bytes((256, 2)))))
    with gguf.open(path) as file:
        array = file.array("t")
        assert file.tensors["t"].dtype is dtype and array.nbytes == dtype.tensor_bytes((256, 2))
        if name not in quants.DECODABLE and dtype.kind == "block":
            with pytest.raises(DTypeError, match=f"graphs have no type {name}"):
                constant(array, dtype=dtype)


def test_tokens_with_any_characters(tmp_path: Path) -> None:
    for tokens in (["a", "\0", "é\0b", ""], ["", ""], [], [""], ["日本", "x" * 300]):
        gguf.write(tmp_path / "x.gguf", {"k": tokens}, [])
        with gguf.open(tmp_path / "x.gguf") as file:
            assert list(file.fields["k"]) == tokens  # type: ignore[arg-type]


# --- split files ---------------------------------------------------------------------------------


def write_split(folder: Path, count: int = 3, **changes: Any) -> Path:
    """`count` parts with one tensor t<i> each. `part1={...}` changes keys of part 1, `name1="u"`
    the name of its tensor.
    """
    paths = [folder / f"m-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    for i, path in enumerate(paths):
        fields = {"split.no": i, "split.count": count, "split.tensors.count": count}
        fields |= changes.get(f"part{i}", {})
        keys = [kv(key, 10, u64(value)) for key, value in fields.items()]
        row = tensor(changes.get(f"name{i}", f"t{i}"), (8,))
        path.write_bytes(build(keys, [row], bytes([i]) * 32))
    return paths[0]


def test_split_files_are_one(tmp_path: Path) -> None:
    with gguf.open(write_split(tmp_path)) as file:
        assert list(file.tensors) == ["t0", "t1", "t2"] and len(file.paths) == 3
        assert [file.array(f"t{i}").tobytes()[0] for i in range(3)] == [0, 1, 2]
        assert [file.tensors[f"t{i}"].part for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part0": {"split.count": 4}}, "must end in -00001-of-00004"),
        ({"part0": {"split.count": 2**32 - 1}}, "must be 0 to 65535"),
        ({"part1": {"split.no": 2}}, "are 2 and 3, expected 1 and 3"),
        ({"part2": {"split.count": 7}}, "are 2 and 7, expected 2 and 3"),
        ({"part0": {"split.tensors.count": 9}}, "9, but the parts have 3"),
        ({"name2": "t0"}, "'t0' is also in .*00001-of-00003.gguf"),
    ],
)
def test_split_contradictions(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    first = write_split(tmp_path, **changes)
    with pytest.raises(GGUFError, match=message):
        gguf.open(first)


def test_split_part_missing_or_opened_first(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    second = tmp_path / "m-00002-of-00003.gguf"
    with pytest.raises(GGUFError, match=r"open .*00001-of-00003"):
        gguf.open(second)
    second.unlink()
    with pytest.raises(GGUFError, match=r"00002-of-00003\.gguf: No such file"):
        gguf.open(first)


def test_split_part_missing_on_request(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with gguf.open(first, allow_missing_data=True) as file:
        assert list(file.tensors) == ["t0", "t2"] and not file.complete
        assert [Path(p).name for p in file.missing] == ["m-00002-of-00003.gguf"]
        assert file.array("t2").tobytes()[0] == 2
        with pytest.raises(GGUFError, match=r"no tensor 't1' .*missing: .*00002-of-00003\.gguf"):
            file.array("t1")
    wrong = write_split(tmp_path, part2={"split.no": 1})
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(GGUFError, match="are 1 and 3, expected 2 and 3"):
        gguf.open(wrong, allow_missing_data=True)
