"""The cuts that `pyggml plan --fit` has tried, as a table and for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyggml.generate.cuts import ANSWER, PROMPT, Trial
from pyggml.runtime.memory import mib
from pyggml.runtime.shards import shard_text
from pyggml.words import counted

#: The most rows of the table.
SHOWN = 8


def trials_text(trials: Sequence[Trial]) -> list[str]:
    """The best cuts in a table, and how many others there were."""
    if len(trials) < 2:
        return []
    fitting = [trial for trial in trials if trial.setup is not None]
    rows = [("cut", "tokens", "batch", "budget", "experts on the host", "prompt, ms", "token, ms",
             "request, ms")]  # fmt: skip
    for trial in fitting[:SHOWN]:
        setup = trial.setup
        assert setup is not None
        budget = "none" if setup.amb is None else f"{setup.amb:g}"
        times = [f"{1e3 * t:.3g}" for t in (trial.prompt, trial.token, trial.seconds)]
        host = f"{setup.host_experts}"
        rows.append((shard_text(trial.cuts), f"{setup.n_ctx}", f"{setup.n_batch}", budget, host,
                     times[0], times[1], times[2]))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        f"Cuts that fit, by the largest context and then by the predicted time of a request of "
        f"{PROMPT} + {ANSWER} tokens, estimated from a few layers:"
    ]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(row[1:], widths[1:]))]
        lines.append("  " + "  ".join(cells))
    more, rest = len(fitting) - SHOWN, [trial for trial in trials if trial.setup is None]
    if more > 0:
        lines.append(f"  and {counted(more, 'other')} that take longer")
    small = [trial for trial in rest if trial.missing > 0]
    if small:
        least = mib(min(trial.missing for trial in small))
        lines.append(
            f"Too large with the largest context and batch: {counted(len(small), 'other cut')}, by "
            f"at least {least} MiB."
        )
    if len(rest) > len(small):
        lines.append(f"Divide nothing of this model: {counted(len(rest) - len(small), 'cut')}.")
    return lines


def trial_json(trial: Trial) -> dict[str, Any]:
    setup = trial.setup
    return {
        "shard": shard_text(trial.cuts),
        "n_ctx": None if setup is None else setup.n_ctx,
        "n_batch": None if setup is None else setup.n_batch,
        "amb": None if setup is None else setup.amb,
        "host_experts": None if setup is None else setup.host_experts,
        "missing": max(trial.missing, 0),
        "prompt_seconds": trial.prompt,
        "token_seconds": trial.token,
        "why": trial.why,
    }
