"""Chat templates against transformers, on SmolLM2's template and on those of llama.cpp's tests."""

from __future__ import annotations

import pytest

from pyggml import gguf
from pyggml.errors import TemplateError
from pyggml.generate.chat import ChatTemplate
from pyggml.generate.tokenizer import Tokenizer
from tests.oracle.packages import package

for name in ("transformers", "tokenizers", "jinja2"):
    pytest.importorskip(name, reason="needs the extras 'oracle' and 'text'")

TALK = [
    {"role": "user", "content": "Hello <there>"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "  How are you?\n"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.mark.oracle
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [TALK, [{"role": "system", "content": "Be brief."}, *TALK]])
def test_smollm2_as_transformers(messages: list[dict[str, str]], prompt: bool) -> None:
    from transformers import AutoTokenizer

    (path,) = package("smollm2").iterdir()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with gguf.open(path) as file:
        tokenizer = Tokenizer(file.fields)
        template = ChatTemplate(file.fields, tokenizer)
    text = template.render(messages, add_generation_prompt=prompt)
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert text == expected
    tokens = tokenizer.encode(text, add_special=False, parse_special=True)
    assert tokens == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.oracle
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_every_template_renders_as_in_transformers(tools: list[dict[str, object]] | None) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    folder = package("vocabularies")
    with gguf.open(folder / "ggml-vocab-llama-bpe.gguf") as file:
        tokenizer = Tokenizer(file.fields)
    variables = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "tools": tools}
    paths = sorted(folder.glob("*.jinja"))
    n_rendered = 0
    for path in paths:
        text = path.read_text()
        ours = ChatTemplate({"tokenizer.chat_template": text}, tokenizer)
        try:
            expected = _compile_jinja_template(text).render(
                messages=TALK, add_generation_prompt=True, **variables
            )
        except Exception:
            with pytest.raises(TemplateError):
                ours.render(TALK, **variables)
            continue
        n_rendered += 1
        assert ours.render(TALK, **variables) == expected, path
    assert n_rendered > 0.8 * len(paths) > 40
