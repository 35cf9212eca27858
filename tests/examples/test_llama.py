"""The example of a llama built from leaves: the library's logits, and its errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
    synth(tmp_path / "m.gguf", arch, dtype=type_)
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
        assert [*example.generate(model, TOKENS, 5, ())] == five
        model.n_past = 0
        assert [*example.generate(model, TOKENS, 5, five[2:3])] == five[: five.index(five[2])]


def test_files_that_the_graph_would_get_wrong(tmp_path: Path) -> None:
    tiny = PRESETS["tiny-llama"]
    assert isinstance(tiny, Llama)
    for arch in (TINY, replace(tiny, rope=replace(tiny.rope, factor=2.0))):
        synth(tmp_path / "m.gguf", arch, dtype="f16")
        with gguf.open(tmp_path / "m.gguf") as file, pytest.raises(gg.GGUFError, match="scaling"):
            example.Llama(file)


def test_the_command(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra 'text'")
    synth(tmp_path / "m.gguf", PRESETS["tiny-llama"], dtype="f16")
    example.main(["-m", str(tmp_path / "m.gguf"), "-p", "the", "-n", "3"])
    output = capfdbinary.readouterr().out
    with gguf.open(tmp_path / "m.gguf") as file:
        tokenizer = example.Tokenizer(file.fields)
        prompt = tokenizer.encode("<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n")
        tokens = [*example.generate(example.Llama(file), prompt, 3, tokenizer.end_tokens)]
    assert len(tokens) == 3
    assert output.rstrip(b"\r\n") == b"".join(map(tokenizer.piece, tokens))
