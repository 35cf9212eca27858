"""Text from a model: continuations and conversations, in pieces as the tokens come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import takewhile
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml.errors import ShapeError
from pyggml.generate.chat import ChatTemplate
from pyggml.generate.sample import greedy
from pyggml.generate.session import Session
from pyggml.generate.tokenizer import Tokenizer

Sampler: TypeAlias = Callable[[NDArray[np.float32]], int]
#: Called as progress(tokens read, tokens of the prompt) before each batch and after the last one.
Progress: TypeAlias = Callable[[int, int], object]


def continuation(
    session: Session,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    *,
    n: int | None = None,
    sampler: Sampler = greedy,
    progress: Progress | None = None,
) -> Iterator[str]:
    """Append tokens to the session and yield the text that follows, token by token.

    n   the most tokens; None: until an end token, or until the context is full
    Errors: ShapeError, before anything runs, if the tokens do not fit.
    """
    if not tokens:
        raise ShapeError("the prompt has no tokens, and at least 1 is needed")
    n_free = session.n_ctx - len(session.tokens) - len(tokens)
    if n_free < 0:
        raise ShapeError(
            f"the prompt's {len(tokens)} tokens do not fit: {n_free + len(tokens)} of "
            f"n_ctx={session.n_ctx} are free; use a larger context (-c) or a shorter prompt"
        )
    n = n_free + 1 if n is None else min(n, n_free + 1)
    ends = tokenizer.end_tokens
    stream = tokenizer.stream()
    rest = _read(session, tokens, progress)
    for i, token in enumerate(session.generate(rest, n, sampler, ends)):
        if progress is not None and i == 0:
            progress(len(tokens), len(tokens))
        if token in ends:
            break
        yield stream.add(token)
    yield stream.finish()


def _read(session: Session, tokens: Sequence[int], progress: Progress | None) -> Sequence[int]:
    """Run all batches of a prompt but the last, which is returned."""
    step = session.n_batch
    start = (len(tokens) - 1) // step * step
    for done in range(0, start + 1, step):
        if progress is not None:
            progress(done, len(tokens))
        if done < start:
            session.forward(tokens[done : done + step], outputs="none")
    return tokens[start:]


class Conversation:
    """A conversation in one session; only what is new runs through the model.

    messages  so far, such as {"role": "user", "content": "Hello"}
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer, template: ChatTemplate, system: str = ""
    ) -> None:
        self.session, self.tokenizer, self.template = session, tokenizer, template
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str, **options: Any) -> Generator[str, None, None]:
        """Yield the answer to a message, in pieces. Options are those of `continuation`.

        If it is interrupted or not read to its end, the part so far counts as the answer. A message
        that fails, for example because it does not fit, is not a part of the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.template.render(messages)
        tokens = self.tokenizer.encode(prompt, add_special=False, parse_special=True)
        self.session.truncate(min(_common(tokens, self.session.tokens), len(tokens) - 1))
        rest = tokens[len(self.session.tokens) :]
        answer = ""
        try:
            for piece in continuation(self.session, self.tokenizer, rest, **options):
                answer += piece
                yield piece
        except (KeyboardInterrupt, GeneratorExit):
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            raise
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens are the same at the start of both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
