"""SmolLM2 against the greedy tokens of transformers (tests/fixtures/smollm2.npz)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pyggml.generate.chat import ChatTemplate
from pyggml.generate.text import Conversation
from pyggml.generate.tokenizer import Tokenizer
from pyggml.models.model import Model, load
from tests.fixtures.case import HERE
from tests.fixtures.make_smollm2 import QUESTION
from tests.oracle.packages import package

pytest.importorskip("tokenizers", reason="needs the extra 'text'")
pytest.importorskip("jinja2", reason="needs the extra 'text'")

FIXTURE = np.load(HERE / "smollm2.npz")
MARGIN = 1e-3


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    (path,) = package("smollm2").glob("*.gguf")
    model = load(path, backends=["numpy"], cache_k="f32", cache_v="f32")
    yield model
    model.file.close()


@pytest.mark.oracle
def test_an_answer_in_text(model: Model) -> None:
    tokenizer = Tokenizer(model.file.fields)
    template = ChatTemplate(model.file.fields, tokenizer)
    session = model.session(n_ctx=256)
    talk = Conversation(session, tokenizer, template)
    assert "".join(talk.answer(QUESTION)) == "The capital of France is Paris."
    n = len(FIXTURE["prompt"])
    assert session.tokens[:n] == FIXTURE["prompt"].tolist()
    assert session.tokens[n:] == FIXTURE["tokens"].tolist()[: len(session.tokens) - n]


@pytest.mark.oracle
def test_64_tokens_are_those_of_transformers(model: Model) -> None:
    tokens, margins = FIXTURE["tokens"].tolist(), FIXTURE["margins"]
    n = int(np.argmax(margins <= MARGIN)) if (margins <= MARGIN).any() else len(tokens)
    assert n == 64
    session = model.session(n_ctx=256)
    logits = session.forward(FIXTURE["prompt"])[-1].astype(np.float64)
    expected = FIXTURE["first_logits"]
    assert np.square(logits - expected).mean() <= 1e-8 * np.square(expected).mean()
    answer = []
    for _ in range(n):
        answer.append(int(logits.argmax()))
        logits = session.forward(answer[-1:])[-1].astype(np.float64)
    assert answer == tokens[:n]
