"""A sequence of tokens with its caches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml.errors import IdError, ShapeError, UnknownNameError
from pyggml.generate import saved
from pyggml.generate.loop import HISTORY, POSITION, Draw
from pyggml.generate.plans import Plans, padded_rows, padded_tokens
from pyggml.generate.sample import Sampler, greedy
from pyggml.runtime.memory import Memory
from pyggml.runtime.plan import Plan
from pyggml.runtime.store import Store

if TYPE_CHECKING:
    from pyggml.models.model import Model

Logits: TypeAlias = NDArray[np.float32]


class Session:
    """A sequence of tokens and its caches. Sessions of one model share its weights.

    tokens  the tokens in the caches
    n_ctx   the most tokens that fit
    n_batch the most tokens of one graph; a longer prompt runs in parts
    most    the most tokens that the caches had since they were empty: `truncate` needs it

    If a call fails or is interrupted, `tokens` lists what was finished, and the session goes on.
    """

    def __init__(self, model: Model, *, n_ctx: int, n_batch: int) -> None:
        if n_ctx < 1 or n_batch < 1:
            raise ShapeError(f"n_ctx={n_ctx} and n_batch={n_batch} must be at least 1")
        self.model, self.n_ctx, self.n_batch = model, n_ctx, min(n_batch, n_ctx)
        self.tokens: list[int] = []
        self._next: tuple[int, int] | None = None  # position and token that the loop's states hold
        self.most = 0
        self.store = Store(like=model.store)
        self.caches = model.caches(n_ctx, self.n_batch)
        self._plans = Plans(model, self.caches, self.store, n_ctx=n_ctx, n_batch=self.n_batch)

    def __repr__(self) -> str:
        return f"<session: {len(self.tokens)} of {self.n_ctx} tokens, {self.model!r}>"

    # -- forward ------------------------------------------------------------------------------

    def forward(
        self, tokens: Iterable[int], outputs: Literal["last", "all", "none"] = "last"
    ) -> Logits:
        """Append tokens and return logits, f32 (1, n_vocab) or (len(tokens), n_vocab).

        outputs  logits of the last token or of all; "none" only fills the caches: (0, n_vocab)
        Errors, before anything runs: ShapeError for more tokens than fit or none; IdError for an
        id outside the vocabulary.
        """
        if outputs not in ("last", "all", "none"):
            raise UnknownNameError(f"outputs={outputs!r} must be 'last', 'all' or 'none'")
        tokens = self._checked(tokens)
        rows: list[Logits] = []
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            last = start + len(part) == len(tokens)
            n_outputs = len(part) if outputs == "all" else int(last and outputs == "last")
            rows.append(self._run(part, n_outputs))
        return np.concatenate(rows)

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        checked = [int(token) for token in tokens]
        if not checked:
            raise ShapeError("forward() needs at least one token")
        n_vocab = self.model.arch.n_vocab
        for token in checked:
            if not 0 <= token < n_vocab:
                raise IdError(f"token {token} is outside the vocabulary of {n_vocab}")
        if len(checked) > self.n_free:
            raise ShapeError(
                f"{len(checked)} tokens do not fit: {self.n_free} of n_ctx={self.n_ctx} are free; "
                "use truncate() or a session with a larger n_ctx"
            )
        return checked

    def _run(self, part: Sequence[int], n_outputs: int) -> Logits:
        self._plans.reserve()
        past, n = len(self.tokens), len(part)
        every = n_outputs == n and n > 1
        n_tokens = padded_tokens(n, self.n_batch)
        n_kv = padded_rows(past + n, self.n_ctx)
        if not every:
            n_tokens, n_kv = self._plans.sizes(n_tokens, n_kv, n_outputs)
        n_all = n_tokens if every else n_outputs
        plan = self.plan(n_tokens, n_kv, n_all)
        pos = np.arange(past, past + n_tokens, dtype=np.int32)
        arrays: dict[str, Any] = {"tokens": _tail(part, n_tokens, 0), "pos": pos}
        if n_tokens > 1:
            arrays["rows"] = _tail(pos[:n], n_tokens, -1)
            arrays["pos"] = _tail(pos[:n], n_tokens, pos[n - 1])
        if "outputs" in plan.inputs:
            arrays["outputs"] = np.array([n - 1], np.int32)
        self.most = max(self.most, past + n)  # even if the run fails
        logits = plan.run(arrays).get("logits")
        self.tokens += part
        if logits is None:
            return np.empty((0, self.model.arch.n_vocab), np.float32)
        return np.asarray(logits, np.float32).reshape(n_all, -1)[:n_outputs]

    def plan(self, n_tokens: int, n_kv: int, n_outputs: int) -> Plan:
        """The plan for `n_tokens` tokens that attend to the first `n_kv` rows of full caches."""
        return self._plans.batch(n_tokens, n_kv, n_outputs)

    # -- memory -------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """The bytes that the session uses, known before anything is allocated or read.

        These are those of the plans for `n_batch` tokens and for one token over full caches, with
        the logits of the last token. Not included: inputs of other lengths (12 bytes a token),
        logits of all tokens, and what `ahead` adds, which is less than 5 bytes for each token of
        the vocabulary and of n_ctx.
        """
        prompt, decode = self._plans.largest()
        return prompt.memory_with(decode)

    # -- generation ---------------------------------------------------------------------------

    def generate(
        self,
        tokens: Iterable[int],
        n: int,
        sampler: Callable[[NDArray[np.float32]], int] = greedy,
        stop: Collection[int] = (),
        *,
        ahead: int = 1,
    ) -> Iterator[int]:
        """Append tokens, then yield up to `n` new ones, each chosen by sampler(logits).

        stop   tokens that end the text; the token itself is yielded, too
        ahead  `greedy` and a Sampler with a top_k run on the device; how many tokens it chooses
               before the host looks at them. A larger number is faster, but the tokens come in
               groups
        The last token that was yielded is not in the caches yet.
        """
        token = sampler(self.forward(tokens)[-1])
        yield token
        left = n - 1
        while left > 0 and token not in stop:
            drawn = isinstance(sampler, Sampler) and sampler.temperature > 0 and sampler.top_k > 0
            if sampler is greedy:
                group = self._ahead(token, min(ahead, left, self.n_free), stop)
            elif drawn:
                assert isinstance(sampler, Sampler)
                group = self._ahead(token, min(ahead, left, self.n_free), stop, sampler)
            else:
                group = [sampler(self.forward([token])[-1])]
            yield from group
            token = group[-1]
            left -= len(group)

    @property
    def n_free(self) -> int:
        """How many more tokens fit."""
        return self.n_ctx - len(self.tokens)

    def _ahead(
        self, token: int, n: int, stop: Collection[int], sampler: Sampler | None = None
    ) -> list[int]:
        """Append `token`, and all but the last of the up to `n` tokens that follow it."""
        self._checked([token])
        past = len(self.tokens)
        inputs: dict[str, Any] = {}
        draw = None
        if sampler is not None:
            k = min(sampler.top_k, self.model.arch.n_vocab)
            draw = Draw(sampler.temperature, k, sampler.top_p, 1 << (n - 1).bit_length())
            noise = [sampler.noise(sampler.count + i, k) for i in range(n)]
            inputs = {"noise": np.zeros((draw.n_steps, k)), "start": np.array([past])}
            inputs["noise"][:n] = noise
        plan = self._plans.loop(padded_rows(past + n, self.n_ctx), stop, draw).bind()
        if self._next != (past, token):
            history = np.zeros(self.n_ctx + 1, np.int32)
            history[past] = token
            self.store.write(HISTORY, history[:, None])
            self.store.write(POSITION, np.array([past], np.int32))
        self._next = None
        self.most = max(self.most, past + n)
        last = int(plan.repeat(n, inputs)["token"][0])
        if n == 1:
            tokens = [token, last]
        else:
            history, end = self.store.read(HISTORY)[:, 0], int(self.store.read(POSITION)[0])
            # A stop token stays at the position where it was chosen.
            tokens = [int(token) for token in history[past : min(end + 1, past + n) + 1]]
        self.tokens += tokens[:-1]
        if last not in stop:
            self._next = past + n, last
        if sampler is not None:
            sampler.count += len(tokens) - 1
        return tokens[1:]

    def truncate(self, n: int) -> None:
        """Forget all but the first `n` tokens.

        If a sliding-window cache has lost rows that the next token sees, the tokens run again.
        """
        if not 0 <= n <= len(self.tokens):
            raise ShapeError(f"truncate({n}): the session has {len(self.tokens)} tokens")
        kept = self.tokens[:n]
        del self.tokens[n:]
        if not all(cache.reaches(n, self.most) for cache in self.caches):
            self.tokens.clear()
            self.most = 0
            if kept:
                self.forward(kept, "none")

    def save(self, path: str | PathLike[str]) -> int:
        """Write tokens and caches to a file, which appears when it is complete; its bytes.

        Errors: OSError, for example if the disk is full; the session goes on.
        """
        self._bind()
        return saved.save(self, path)

    def load(self, path: str | PathLike[str]) -> None:
        """Replace tokens and caches by those of a file.

        GGUFError if it was saved by another model, has other cache types or more tokens than fit;
        then the session is as before.
        """
        self._bind()
        saved.restore(self, path)

    def fork(self) -> Session:
        """A new session that goes on from the same tokens; its caches are copies."""
        other = Session(self.model, n_ctx=self.n_ctx, n_batch=self.n_batch)
        self._bind()
        other._bind()
        for name in self.store.homes:
            other.store.write(name, self.store.read(name, raw=True))
        other.tokens, other.most = list(self.tokens), self.most
        return other

    def _bind(self) -> None:
        """Make the caches exist."""
        self.plan(1, padded_rows(1, self.n_ctx), 1).bind()


def _tail(values: Sequence[int] | NDArray[np.int32], n: int, fill: int) -> NDArray[np.int32]:
    """The values, followed by `fill` up to a length of `n`."""
    array = np.full(n, fill, np.int32)
    array[: len(values)] = values
    return array
