"""The example of a llama built from leaves: the library's logits, tokens, and its errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from examples import llama as example
from pyggml import gguf
from pyggml.models.llama import Llama
from pyggml.models.model import load
from pyggml.models.presets import PRESETS, TINY
from pyggml.models.synth import synth
from pyggml.parity.tolerance import relative_error

TOKENS = [7, 3, 200, 41, 5, 5, 399, 12, 88, 17, 301, 90, 14, 62, 480, 511, 0, 1, 9]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("type_", ["f16", "q4_1"])
def test_logits_are_the_librarys(tmp_path: Path, type_: str, tied: bool) -> None:
    """A prompt in three parts, the last one padded, then single tokens."""
    arch = PRESETS["tiny-llama"]
    assert isinstance(arch, Llama)
    arch = replace(arch, tied=tied, rope=replace(arch.rope, freq_base=5000.0))
    synth(tmp_path / "m.gguf", arch, type=type_)
    with load(tmp_path / "m.gguf", backends=["numpy"]) as library:
        session = library.session(64)
        expected = session.forward(TOKENS, "all")
        session.truncate(0)
        five = [*session.generate(TOKENS, 5)]
    with gguf.open(tmp_path / "m.gguf") as file:
        model = example.Llama(file, n_ctx=64, n_batch=7)
        rows = [model.forward(TOKENS[:16])] + [model.forward([token]) for token in TOKENS[16:]]
        assert relative_error(np.stack(rows), expected[15:]) < 1e-4
        assert sorted(model.plans) == [1, 7] and model.n_past == len(TOKENS)
        for tokens in ([], range(46)):
            with pytest.raises(gg.ShapeError, match="1 to 45 fit"):
                model.forward(tokens)
        model.n_past = 0
        assert [*example.generate(model, TOKENS, 5, -1)] == five
        model.n_past = 0
        assert [*example.generate(model, TOKENS, 5, five[2])] == five[: five.index(five[2])]


def test_another_architecture(tmp_path: Path) -> None:
    synth(tmp_path / "m.gguf", TINY, type="f16")
    with gguf.open(tmp_path / "m.gguf") as file, pytest.raises(gg.GGUFError, match="for arch"):
        example.Llama(file)


def vocabulary_fields() -> dict[str, Any]:
    """The bytes, some merges in order of rank, and control tokens."""
    empty: dict[str, Any] = {"tokens": [], "merges": [], "token_type": [], "eos_token_id": 2}
    fields = {f"tokenizer.ggml.{key}": value for key, value in empty.items()}
    file: Any = SimpleNamespace(fields=fields)
    chars = list(example.Vocabulary(file).chars.values())
    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ"]
    tokens = ["<|im_start|>", "<|im_end|>", "<|end|>", *chars]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [3] * 3 + [1] * (len(tokens) - 3)
    return fields | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
    }


def test_tokens() -> None:
    file: Any = SimpleNamespace(fields=vocabulary_fields())
    vocabulary = example.Vocabulary(file)

    def pieces(text: str) -> list[str]:
        return [vocabulary.tokens[token] for token in vocabulary.encode(text)]

    assert pieces("the theme in") == ["t", "he", "Ġthe", "m", "e", "Ġ", "in"]
    assert pieces("x   the\n\n1") == ["x", "ĠĠ", "Ġthe", "Ċ", "Ċ", "1"]
    assert pieces("  12") == ["ĠĠ", "1", "2"]
    assert pieces("<|im_start|>he<|im_end|>") == ["<|im_start|>", "he", "<|im_end|>"]
    for text in ("don't_x 3.5", "Zürich 東京 🎉\t\x00", "a  b\n \n c  "):
        assert b"".join(map(vocabulary.decode, vocabulary.encode(text))).decode() == text
    assert [vocabulary.decode(i) for i in range(3)] == [b""] * 3


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """A file whose vocabulary consists of bytes answers the question it was asked."""
    path, fields = tmp_path / "m.gguf", vocabulary_fields()
    arch = replace(PRESETS["tiny-llama"], n_vocab=len(fields["tokenizer.ggml.tokens"]))
    synth(tmp_path / "plain.gguf", arch, type="f16")
    with gguf.open(tmp_path / "plain.gguf") as file:
        tensors = [
            gguf.Tensor(name, info.dtype, info.ne, lambda name=name: [file.array(name)])  # type: ignore[misc]
            for name, info in file.tensors.items()
        ]
        gguf.write(path, arch.fields() | fields, tensors)
    example.main(["-m", str(path), "-p", "the", "-n", "3"])
    output = capsysbinary.readouterr().out
    with gguf.open(path) as file:
        vocabulary = example.Vocabulary(file)
        prompt = [*vocabulary.encode("<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n")]
        tokens = example.generate(example.Llama(file), prompt, 3, vocabulary.end)
        expected = b"".join(map(vocabulary.decode, tokens))
    assert output.strip(b"\n") == expected.strip(b"\n") and expected
