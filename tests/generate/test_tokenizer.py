"""Tokenizers of small vocabularies: words, special tokens, streams, and files that are wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyggml.errors import GGUFError, IdError, MissingPackageError
from pyggml.generate.splits import SPLITS
from pyggml.generate.tokenizer import Tokenizer
from pyggml.generate.vocabulary import CONTROL, NORMAL, USER_DEFINED
from tests.generate.vocabularies import bpe, named, spm, tokenizer

pytest.importorskip("tokenizers", reason="needs the extra 'text'")

TEXTS = ["", "hello world", "naïve 😀 text", "a  b\n\n c", " ", "ab\x00\x7f", "hello\tworld<s>"]


def texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    return [tokenizer.vocabulary.texts[token] for token in tokens]


def test_words_are_merged(tmp_path: Path) -> None:
    bpe_tokenizer = tokenizer(tmp_path, bpe())
    assert texts(bpe_tokenizer, bpe_tokenizer.encode("hello world12")) == ["hello", "Ġworld", "12"]
    assert texts(bpe_tokenizer, bpe_tokenizer.encode("world")) == ["w", "or", "ld"]
    spm_tokenizer = tokenizer(tmp_path, spm())
    # ab has a higher score than ba and ▁ab
    assert texts(spm_tokenizer, spm_tokenizer.encode("baba")) == ["<s>", "▁", "b", "ab", "a"]
    tokens = spm_tokenizer.encode("ab  é", add_special=False)
    assert texts(spm_tokenizer, tokens) == ["▁ab", "▁▁", "<0xC3>", "<0xA9>"]


@pytest.mark.parametrize("fields", [bpe(), spm()], ids=["bpe", "spm"])
@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_back(tmp_path: Path, fields: dict[str, Any], text: str) -> None:
    tok = tokenizer(tmp_path, fields)
    tokens = tok.encode(text)
    assert tok.decode(tokens) == text
    stream = tok.stream()
    streamed = "".join(map(stream.add, tokens)) + stream.finish()
    assert streamed.removeprefix(" " * (fields["tokenizer.ggml.model"] == "llama")) == text


def test_control_tokens_are_read_only_on_request(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path, bpe())
    text = "hello<|im_end|>hello<|im_end|><b>"
    plain = texts(tok, tok.encode(text))
    assert plain.count("<|im_end|><b>") == 1 and "<|im_end|>" not in plain
    assert tok.decode(tok.encode(text)) == text
    tokens = tok.encode(text, parse_special=True)
    assert texts(tok, tokens) == ["hello", "<|im_end|>", "hello", "<|im_end|><b>"]
    assert tok.decode(tokens) == "hellohello<|im_end|><b>"
    assert tok.decode(tokens, special=True) == text


def test_bos_and_eos(tmp_path: Path) -> None:
    assert tokenizer(tmp_path, bpe()).encode("") == []
    tok = tokenizer(tmp_path, bpe(add_bos_token=True, add_eos_token=True))
    assert texts(tok, tok.encode("12")) == ["<s>", "12", "<s>"]
    assert texts(tok, tok.encode("12", add_special=False)) == ["12"]
    assert tokenizer(tmp_path, bpe(pre="llama-bpe")).add_bos
    assert not tokenizer(tmp_path, spm(add_bos_token=False)).encode("")
    with pytest.raises(GGUFError, match="bos_token_id' is missing"):
        tokenizer(tmp_path, bpe(add_bos_token=True, bos_token_id=None))


def test_the_space_before_a_text(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path, spm())
    tokens = tok.encode("ab<user>ab", add_special=False)
    assert texts(tok, tokens) == ["▁ab", "<user>", "▁ab"]
    tok = tokenizer(tmp_path, spm(add_space_prefix=False))
    assert texts(tok, tok.encode("ab", add_special=False)) == ["ab"]
    assert tok.decode(tok.encode(" ab")) == " ab"


def test_a_stream_holds_back_incomplete_characters(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path, bpe())
    stream = tok.stream()
    assert [stream.add(token) for token in tok.encode("😀é")] == ["", "", "", "😀", "", "é"]
    assert stream.finish() == ""
    assert stream.add(tok.encode("😀")[0]) == "" and stream.finish() == "\ufffd"


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path, bpe())
    assert tok.decode(tok.encode("a\udcff")) == "a\ufffd"


def ends(folder: Path, texts: dict[str, int], **keys: Any) -> list[str]:
    names = ["<bos>", *texts]
    merges = ["< /s>"] if "</s>" in texts and texts["</s>"] == NORMAL else ["a b"]
    names += ["<", "/s>", "a", "b", "ab"]
    types = np.array([CONTROL, *texts.values(), *[NORMAL] * 5], np.int32)
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": names, "token_type": types}
    tok = tokenizer(folder, named(fields | {"merges": merges, **keys}))
    return sorted(names[token] for token in tok.end_tokens)


def test_end_tokens(tmp_path: Path) -> None:
    assert ends(tmp_path, {"<|im_end|>": CONTROL, "<|x|>": CONTROL}) == ["<|im_end|>"]
    assert ends(tmp_path, {"<|x|>": CONTROL}, eos_token_id=1) == ["<|x|>"]
    assert ends(tmp_path, {"<|x|>": CONTROL, "<|y|>": CONTROL}, eot_token_id=1, eom_token_id=2) == [
        "<|x|>",
        "<|y|>",
    ]
    harmony = {"<|return|>": CONTROL, "<|call|>": CONTROL, "<|end|>": CONTROL}
    assert ends(tmp_path, harmony) == ["<|call|>", "<|return|>"]
    assert ends(tmp_path, {"<|end|>": CONTROL}) == ["<|end|>"]
    assert ends(tmp_path, {"<|eot_id|>": NORMAL}) == ["<|eot_id|>"]  # a converter's mistake
    assert ends(tmp_path, {"</s>": NORMAL}) == []  # a word like others
    assert ends(tmp_path, {"</s>": USER_DEFINED}) == ["</s>"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (bpe(pre="no-such"), "tokenizer.ggml.pre': pyggml does not know how 'no-such' splits"),
        (bpe(model="bert"), "has no tokenizer 'bert'"),
        (bpe(model=None), "has no tokenizer None"),
        (bpe(tokens=None), "tokenizer.ggml.tokens' is missing"),
        (bpe(merges=None), "tokenizer.ggml.merges' is missing"),
        (bpe(merges=["ab"]), "'ab' is not two texts with a space"),
        (bpe(merges=["é é"]), "tokenizer.ggml.merges'.*out of vocabulary"),
        (bpe(token_type=np.zeros(5, np.int32)), "5 numbers for 270 tokens"),
        (bpe(eos_token_id=1000), "eos_token_id': 1000, of 270 tokens"),
        (bpe(add_bos_token=1), "add_bos_token': expected bool, got int"),
        (spm(scores=None), "tokenizer.ggml.scores' is missing"),
    ],
)
def test_wrong_files(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        tokenizer(tmp_path, fields)


def test_a_file_without_pre_gives_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre' is missing"):
        tokenizer(tmp_path, bpe(pre=None))


def test_unknown_tokens(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path, bpe())
    for token in (-1, len(tok)):
        with pytest.raises(IdError, match="outside the vocabulary of 270"):
            tok.decode([token])


def test_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingPackageError, match=r"'tokenizers'.*\[text\]"):
        tokenizer(tmp_path, bpe())


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_is_valid(tmp_path: Path, name: str) -> None:
    tok = tokenizer(tmp_path, bpe(pre=name))
    text = "hello world's 12345 漢字かな HelloWorld\r\n\n  don't—é́"
    assert tok.decode(tok.encode(text)) == text
