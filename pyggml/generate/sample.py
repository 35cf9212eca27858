"""Choosing the next token from logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyggml.errors import ShapeError


def greedy(logits: NDArray[np.float32]) -> int:
    """The token with the largest logit; of equal ones the lowest id."""
    return int(np.argmax(logits))


def best(logits: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """The ids of the k largest logits, largest first; of equal ones the lowest id first."""
    k = min(k, len(logits))
    ids = np.flatnonzero(logits >= -np.partition(-logits, k - 1)[k - 1])
    return np.asarray(ids[np.argsort(-logits[ids], kind="stable")][:k])


class Sampler:
    """Draws tokens from softmax(logits / temperature), limited to the best.

    temperature  0 chooses as `greedy` does
    top_k        the k largest logits only; 0: all
    top_p        then the fewest tokens whose probabilities add up to at least this
    seed         of the random numbers; the same seed and logits give the same tokens
    count        how many tokens were drawn

    The token of the largest logit / temperature + noise, with Gumbel noise, has these
    probabilities. So the device can draw too: noise is all the randomness that it needs.
    """

    def __init__(
        self, *, temperature: float = 0.8, top_k: int = 40, top_p: float = 0.95, seed: int = 0
    ) -> None:
        if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ShapeError(
                f"temperature={temperature} and top_k={top_k} must be at least 0, and "
                f"top_p={top_p} above 0 and at most 1"
            )
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self.count = 0

    def noise(self, number: int, n: int) -> NDArray[np.float64]:
        """The noise of draw `number`, for the n best tokens."""
        return np.random.default_rng([self.seed, number]).gumbel(size=n)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        self.count += 1
        if self.temperature == 0:
            return greedy(logits)
        order = best(logits, self.top_k or len(logits))
        scores = logits[order].astype(np.float64) / self.temperature
        probs = np.exp(scores - scores[0])
        probs /= probs.sum()
        n = int(np.sum(np.cumsum(probs) - probs < self.top_p))
        noise = self.noise(self.count - 1, len(order))
        return int(order[np.argmax(scores[:n] + noise[:n])])
