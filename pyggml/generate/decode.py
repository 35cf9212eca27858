"""Tokens that the device chooses, for a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import in_host_memory
from pyggml.generate.loop import HISTORY, POSITION, Draw
from pyggml.generate.plans import padded_rows
from pyggml.generate.sample import Sampler
from pyggml.runtime.plan import Plan
from pyggml.runtime.submitted import Submitted

if TYPE_CHECKING:
    from pyggml.generate.session import Session


class Choice(NamedTuple):
    """How the device chooses a token, and the tokens at which it stops.

    sampler  None: the best token
    stop     sorted
    """

    sampler: Sampler | None
    stop: tuple[int, ...]

    @property
    def number(self) -> int:
        """How many tokens the sampler has drawn, which is the number of its next draw."""
        return self.sampler.count if self.sampler is not None else 0

    def drew(self, n: int) -> None:
        """Count `n` draws."""
        if self.sampler is not None:
            self.sampler.count += n


class _Early(NamedTuple):
    """A step that was submitted before the host knew the token that it feeds.

    past, token  the token and its position
    number       of the draw
    """

    past: int
    token: int
    choice: Choice
    number: int
    run: Submitted


class Decoder:
    """Runs the plans of `loop_plan` for a session.

    While the host reads a token, the device already works on the next step, which needs nothing
    from the host. If the text ends there, or if something else comes first, that step is wasted. It
    has only written the row of a position that is not in `tokens` yet, which the next token
    overwrites.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._next: tuple[int, int] | None = None  # position and token that the states hold
        self._early: _Early | None = None

    def forget(self) -> None:
        """Drop the early step, because the session's tokens are about to change."""
        self._early = None

    def one(self, token: int, choice: Choice, more: bool) -> int:
        """Append `token`; the token that follows it.

        more  whether another step will follow
        """
        session, early = self._session, self._early
        past, self._early = len(session.tokens), None
        if early is not None and early[:4] == (past, token, choice, choice.number):
            run = early.run
        else:
            self._feed(past, token, choice)
            run = self._submitted(past, choice, choice.number)
        next_run = None
        if more and past + 2 <= session.n_ctx and self._is_asynchronous(past + 2, choice):
            next_run = self._submitted(past + 1, choice, choice.number + 1)
        following = int(run.result()["token"][0])
        session.tokens.append(token)
        choice.drew(1)
        if following not in choice.stop:  # else the position stays
            if next_run is not None:
                self._early = _Early(past + 1, following, choice, choice.number, next_run)
            else:
                self._next = past + 1, following
        return following

    def group(self, token: int, n: int, choice: Choice) -> list[int]:
        """Append `token`, and all but the last of the up to `n` tokens that follow it."""
        session = self._session
        past, self._early = len(session.tokens), None
        self._feed(past, token, choice)
        self._next = None
        session.most = max(session.most, past + n)
        inputs = self._inputs(past, n, choice, choice.number)
        last = int(self._plan(past + n, n, choice).repeat(n, inputs)["token"][0])
        store = session.store
        history, end = store.read(HISTORY)[:, 0], int(store.read(POSITION)[0])
        # A stop token stays at the position where it was chosen.
        tokens = [int(token) for token in history[past : min(end + 1, past + n) + 1]]
        session.tokens += tokens[:-1]
        if last not in choice.stop:
            self._next = past + n, last
        choice.drew(len(tokens) - 1)
        return tokens[1:]

    def _feed(self, past: int, token: int, choice: Choice) -> None:
        """Make the states hold `token` at position `past`."""
        if self._next == (past, token):
            return
        self._next = None
        self._plan(past + 1, 1, choice).bind()
        history = np.zeros(self._session.n_ctx + 1, np.int32)
        history[past] = token
        self._session.store.write(HISTORY, history[:, None])
        self._session.store.write(POSITION, np.array([past], np.int32))
        self._next = past, token

    def _submitted(self, past: int, choice: Choice, number: int) -> Submitted:
        """The step that feeds the token at position `past`."""
        self._next = None
        self._session.most = max(self._session.most, past + 1)
        return self._plan(past + 1, 1, choice).submit(self._inputs(past, 1, choice, number))

    def _is_asynchronous(self, n_rows: int, choice: Choice) -> bool:
        """Whether a step is queued without a wait: the host takes no part in it."""
        splits = self._plan(n_rows, 1, choice).splits
        return not any(in_host_memory(split.backend) for split in splits)

    def _plan(self, n_rows: int, n: int, choice: Choice) -> Plan:
        """The plan for `n` steps that see `n_rows` rows."""
        session, draw = self._session, None
        if choice.sampler is not None:
            sampler, steps = choice.sampler, 1 << (n - 1).bit_length()
            draw = Draw(sampler.temperature, self._top_k(sampler), sampler.top_p, steps)
        return session.plans.loop(padded_rows(n_rows, session.n_ctx), choice.stop, draw)

    def _top_k(self, sampler: Sampler) -> int:
        return min(sampler.top_k, self._session.model.arch.n_vocab)

    def _inputs(
        self, past: int, n: int, choice: Choice, number: int
    ) -> dict[str, NDArray[np.float32]]:
        """The noise of `n` draws from `number` on, and the position of the first."""
        if choice.sampler is None:
            return {}
        k = self._top_k(choice.sampler)
        noise = np.zeros((1 << (n - 1).bit_length(), k), np.float32)
        for i in range(n):
            noise[i] = choice.sampler.noise(number + i, k)
        return {"noise": noise, "start": np.array([past], np.float32)}
