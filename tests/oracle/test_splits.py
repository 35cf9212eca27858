"""How texts are cut into words: every `tokenizer.ggml.pre` against llama.cpp.

llama.cpp keeps answers for few vocabularies, so this takes GPT-2's, with another pre.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.oracle
pytest.importorskip("tokenizers", reason="needs the extra 'text'")
pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (the extra 'oracle')")

from llama_cpp import Llama  # noqa: E402

from pyggml import gguf  # noqa: E402
from pyggml.generate.splits import SPLITS  # noqa: E402
from pyggml.generate.tokenizer import Tokenizer  # noqa: E402
from tests.oracle.packages import package  # noqa: E402
from tests.oracle.test_vocabularies import BETWEEN  # noqa: E402

TEXTS = [
    "I'LL say it's 12345 x 67,890.5!\n\n  def f(a_b):\t return a/b//c\r\n",
    "HelloWorld iPhone XMLHttpRequest ÉCOLE école 汉字和English混合 かな カナ 한국어 ไทย हिन्दी",
    "  \n \n\n\t\t x  y   z \u3000 \u00a0! \U0001f600\u200d\U0001f525 e\u0301 “quotes”…",
    "--- $%^&*(){}[]<>|~`@#",
    "http://a.b/c?d=e&f  /path/\n//comment\n\n'sne 'Tis 're D'accord ٣٤٥ ²³ Ⅷ",
]


@pytest.fixture(scope="module")
def base() -> tuple[dict[str, Any], list[str]]:
    """The keys of GPT-2's vocabulary, and texts."""
    path = package("vocabularies") / "ggml-vocab-gpt-2.gguf"
    with gguf.open(path) as file:
        fields = dict(file.typed_fields())
    with open(f"{path}.inp", newline="", encoding="utf-8") as file:
        return fields, TEXTS + file.read().split(BETWEEN)[:-1]


@pytest.mark.parametrize("pre", SPLITS)
def test_words_are_llama_cpps(
    base: tuple[dict[str, Any], list[str]], pre: str, tmp_path: Path
) -> None:
    fields, texts = base
    if pre == "kimi-k2":  # the model's regex cuts before a capital, llama.cpp's code does not
        texts = [text.lower() for text in texts]
    gguf.write(tmp_path / "v.gguf", fields | {"tokenizer.ggml.pre": pre}, [])
    with gguf.open(tmp_path / "v.gguf") as file:
        ours = Tokenizer(file.fields)
    theirs = Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    try:
        for text in texts:
            raw = text.encode()
            answer = theirs.tokenize(raw, add_bos=False, special=False) if raw else []
            assert ours.encode(text, add_special=False) == answer, text
    finally:
        theirs.close()
