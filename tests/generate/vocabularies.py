"""Small vocabularies, as fields of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pyggml import gguf
from pyggml.generate.tokenizer import Tokenizer, byte_characters
from pyggml.generate.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "1 2", "é é")
#: Tokens after the 256 bytes and the products of MERGES[:-1]; the last merge is added in a test.
SPECIAL = {"<s>": CONTROL, "<|im_end|>": CONTROL, "<|im_end|><b>": USER_DEFINED, "  ": USER_DEFINED}


def bpe(**changes: Any) -> dict[str, Any]:
    """A BPE vocabulary: all bytes, a few merges, and the tokens of SPECIAL."""
    products = [merge.replace(" ", "") for merge in MERGES[:-1]]
    texts = [*byte_characters(), *products, *SPECIAL]
    types = [NORMAL] * (256 + len(products)) + list(SPECIAL.values())
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": texts,
        "token_type": np.array(types, np.int32),
        "merges": list(MERGES[:-1]),
        "bos_token_id": texts.index("<s>"),
        "eos_token_id": texts.index("<s>"),
    }
    return named(fields | changes)


def spm(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary with byte fallback."""
    words = {"▁": -3.0, "a": -4.0, "b": -4.5, "ab": -1.0, "ba": -2.0, "▁ab": -1.5, "▁▁": -2.5}
    heads = ["<unk>", "<s>", "</s>"]
    texts = [*heads, *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<user>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words), USER_DEFINED]
    fields = {
        "model": "llama",
        "tokens": texts,
        "scores": np.array([0.0] * 259 + [*words.values(), 0.0], np.float32),
        "token_type": np.array(types, np.int32),
    }
    return named(fields | changes)


def named(fields: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


def tokenizer(folder: Path, fields: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file with these fields."""
    path = folder / "vocabulary.gguf"
    gguf.write(path, {"general.architecture": "llama", **fields}, [])
    with gguf.open(path) as file:
        return Tokenizer(file.fields)
