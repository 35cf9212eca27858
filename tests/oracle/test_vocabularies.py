"""Tokenizers against the answers that llama.cpp keeps for its test vocabularies."""

from __future__ import annotations

import pytest

from pyggml import gguf
from pyggml.errors import GGUFError
from pyggml.generate.tokenizer import Tokenizer
from tests.oracle.packages import package

pytest.importorskip("tokenizers", reason="needs the extra 'text'")

SUPPORTED = (
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm",
    "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip
UNSUPPORTED = ("bert-bge", "gemma-4", "nomic-bert-moe")
BETWEEN = "\n__ggml_vocab_test__\n"


@pytest.mark.oracle
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_answer_is_llama_cpps(name: str) -> None:
    path = package("vocabularies") / f"ggml-vocab-{name}.gguf"
    with gguf.open(path) as file:
        tokenizer = Tokenizer(file.fields)
    with open(f"{path}.inp", newline="", encoding="utf-8") as file:
        texts = file.read().split(BETWEEN)[:-1]
    with open(f"{path}.out") as file:
        answers = [[int(word) for word in line.split()] for line in file]
    assert len(texts) == len(answers) >= 46
    for text, answer in zip(texts, answers, strict=True):
        tokens = tokenizer.encode(text, add_special=False)
        assert tokens == answer, text
        assert tokenizer.decode(tokens) == text


@pytest.mark.oracle
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_tokenizers_are_refused(name: str) -> None:
    path = package("vocabularies") / f"ggml-vocab-{name}.gguf"
    with gguf.open(path) as file, pytest.raises(GGUFError, match="pyggml has no tokenizer"):
        Tokenizer(file.fields)


@pytest.mark.oracle
def test_every_vocabulary_is_in_a_list() -> None:
    names = {path.stem for path in package("vocabularies").glob("*.gguf.inp")}
    assert {f"ggml-vocab-{name}.gguf" for name in SUPPORTED} <= names
    assert names - {f"ggml-vocab-{name}.gguf" for name in (*SUPPORTED, *UNSUPPORTED)} == set()
