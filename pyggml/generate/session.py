"""A sequence of tokens with its caches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from os import PathLike
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml.errors import IdError, ShapeError, UnknownNameError
from pyggml.generate import saved
from pyggml.generate.decode import Choice, Decoder
from pyggml.generate.plans import Plans, padded_rows, padded_tokens
from pyggml.generate.sample import Sampler, greedy
from pyggml.runtime.fixed import Fixed
from pyggml.runtime.memory import Memory
from pyggml.runtime.plan import Plan
from pyggml.runtime.store import Store
from pyggml.runtime.submitted import Submitted

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
        self.most = 0
        self.store = Store(like=model.store)
        self.caches = model.caches(n_ctx, self.n_batch)
        self.plans = Plans(model, self.caches, self.store, n_ctx=n_ctx, n_batch=self.n_batch)
        self._decoder = Decoder(self)
        self._step: _Step | None = None
        self._token = {"tokens": np.zeros(1, np.int32), "pos": np.zeros(1, np.int32)}

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
        self._decoder.forget()
        if len(tokens) <= self.n_batch:
            return self._run(tokens, {"last": 1, "all": len(tokens), "none": 0}[outputs])
        parts = [tokens[i : i + self.n_batch] for i in range(0, len(tokens), self.n_batch)]
        if outputs == "all":
            return np.concatenate([self._run(part, len(part)) for part in parts])
        queue = _Queue(self.tokens)
        try:
            for part in parts[:-1]:
                plan, arrays = self.prepared(queue.past, part, 0)
                queue.add(part, plan.submit(arrays))
            logits = self._run(parts[-1], int(outputs == "last"), queue)
        except BaseException:
            with suppress(Exception):  # the first error is what counts
                queue.finish()
            raise
        return logits

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        checked = [*map(int, tokens)]
        if not checked:
            raise ShapeError("forward() needs at least one token")
        n_vocab = self.model.arch.n_vocab
        for token in checked:
            if not 0 <= token < n_vocab:
                raise IdError(f"token {token} is outside the vocabulary of {n_vocab}")
        if len(checked) > self.n_ctx - len(self.tokens):
            raise ShapeError(
                f"{len(checked)} tokens do not fit: {self.n_free} of n_ctx={self.n_ctx} are free; "
                "use truncate() or a session with a larger n_ctx"
            )
        return checked

    def _run(self, part: Sequence[int], n_outputs: int, queue: _Queue | None = None) -> Logits:
        """Run a part, after those in the queue; the logits of its last `n_outputs` tokens."""
        past = len(self.tokens) if queue is None else queue.past
        if len(part) == 1:
            logits = self._fed(past, part[0], n_outputs).inputs.run().get("logits")
        else:
            plan, arrays = self.prepared(past, part, n_outputs)
            logits = plan.run(arrays).get("logits")
        if queue is not None:
            queue.finish()
        self.tokens[past:] = part
        if logits is None:
            return np.empty((0, self.model.arch.n_vocab), np.float32)
        rows: Logits = logits
        return rows if len(rows) == n_outputs else rows[:n_outputs]

    def prepared(
        self, past: int, part: Sequence[int], n_outputs: int
    ) -> tuple[Plan, dict[str, NDArray[np.int32]]]:
        """The plan for a part of the prompt after `past` tokens, and its inputs, whose arrays are
        valid until the next call."""
        n = len(part)
        if n == 1:
            return self._fed(past, part[0], n_outputs).plan, self._token
        self.plans.reserve()
        every = n_outputs == n
        n_tokens = padded_tokens(n, self.n_batch)
        n_kv = padded_rows(past + n, self.n_ctx)
        if not every:
            n_tokens, n_kv = self.plans.sizes(n_tokens, n_kv, n_outputs)
        plan = self.plan(n_tokens, n_kv, n_tokens if every else n_outputs)
        self.most = max(self.most, past + n)  # even if the run fails
        pos = np.arange(past, past + n, dtype=np.int32)
        arrays = {
            "tokens": _tail(part, n_tokens, 0),
            "pos": _tail(pos, n_tokens, past + n - 1),
            "rows": _tail(pos, n_tokens, -1),
        }
        if "outputs" in plan.inputs:
            arrays["outputs"] = np.array([n - 1], np.int32)
        return plan, arrays

    def _fed(self, past: int, token: int, n_outputs: int) -> _Step:
        """The step for one token, with its inputs. A device waits for it: it makes no objects."""
        n, step = past + 1, self._step
        if step is None or n not in step.rows or n_outputs != step.n_outputs:
            self.plans.reserve()
            most = padded_rows(n, self.n_ctx)
            plan = self.plan(*self.plans.sizes(1, most, n_outputs), n_outputs)
            inputs = Fixed(plan, self._token)
            self._step = step = _Step(range(n, most + 1), n_outputs, plan, inputs)
        self.most = max(self.most, n)  # even if the run fails
        self._token["tokens"][0], self._token["pos"][0] = token, past
        return step

    def plan(self, n_tokens: int, n_kv: int, n_outputs: int) -> Plan:
        """The plan for `n_tokens` tokens that attend to the first `n_kv` rows of full caches."""
        return self.plans.batch(n_tokens, n_kv, n_outputs)

    # -- memory -------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """The bytes that the session uses, known before anything is allocated or read.

        These are those of the plans for `n_batch` tokens and for one token over full caches, with
        the logits of the last token; and, if attention is sparse over many rows, of those over the
        most rows for which it is dense. Not included: inputs of other lengths (12 bytes a token,
        rounded up), logits of all tokens, and what `generate` adds, which is less than 5 bytes for
        each token of the vocabulary and of n_ctx.
        """
        first, *others = self.plans.largest()
        return first.memory_with(*others)

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
               before the host looks at them. A larger number is a little faster, but the tokens
               come in groups. With 1, a device works on the next token while the host has this
               one
        The last token that was yielded is not in the caches yet.
        """
        token = sampler(self.forward(tokens)[-1])
        yield token
        left = n - 1
        choice = self._choice(sampler, stop)
        while left > 0 and token not in stop:
            if choice is None:
                group = [sampler(self.forward([token])[-1])]
            else:
                group = self._ahead(token, min(ahead, left, self.n_free), choice, left)
            yield from group
            token = group[-1]
            left -= len(group)

    def _choice(
        self, sampler: Callable[[NDArray[np.float32]], int], stop: Collection[int]
    ) -> Choice | None:
        """The sampler as the device runs it; None if it cannot."""
        tokens = tuple(sorted(stop))
        if sampler is greedy:
            return Choice(None, tokens)
        if isinstance(sampler, Sampler) and sampler.temperature > 0 and sampler.top_k > 0:
            return Choice(sampler, tokens)
        return None

    def _ahead(self, token: int, n: int, choice: Choice, left: int) -> list[int]:
        self._checked([token])
        if n == 1:
            return [self._decoder.one(token, choice, more=left > 1)]
        return self._decoder.group(token, n, choice)

    @property
    def n_free(self) -> int:
        """How many more tokens fit."""
        return self.n_ctx - len(self.tokens)

    def truncate(self, n: int) -> None:
        """Forget all but the first `n` tokens.

        If a sliding-window cache has lost rows that the next token sees, the tokens run again.
        """
        if not 0 <= n <= len(self.tokens):
            raise ShapeError(f"truncate({n}): the session has {len(self.tokens)} tokens")
        self._decoder.forget()
        tokens = self.tokens[:n]
        del self.tokens[n:]
        if not all(cache.reaches(n, self.most) for cache in self.caches):
            self.tokens.clear()
            self.most = 0
            if tokens:
                self.forward(tokens, "none")

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
        for name in other.store.homes:  # the caches; generate() makes further states
            other.store.write(name, self.store.read(name, raw=True))
        other.tokens, other.most = list(self.tokens), self.most
        return other

    def _bind(self) -> None:
        """Make the caches exist."""
        self.plan(1, padded_rows(1, self.n_ctx), 1).bind()


class _Step(NamedTuple):
    """The plan for one token that attends to any of these numbers of rows, and its inputs."""

    rows: range
    n_outputs: int
    plan: Plan
    inputs: Fixed


class _Queue:
    """Parts of a prompt that were submitted: they count as soon as they are finished."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._parts: list[tuple[int, Sequence[int], Submitted]] = []
        self.past = len(tokens)

    def add(self, part: Sequence[int], run: Submitted) -> None:
        self._parts.append((self.past, part, run))
        self.past += len(part)

    def finish(self) -> None:
        """Add the tokens of the parts that were finished, up to the first that failed."""
        for past, part, run in self._parts:
            run.result()
            self._tokens[past:] = part


def _tail(values: Sequence[int] | NDArray[np.int32], n: int, fill: int) -> NDArray[np.int32]:
    """The values, followed by `fill` up to a length of `n`."""
    array = np.full(n, fill, np.int32)
    array[: len(values)] = values
    return array
