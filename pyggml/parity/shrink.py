"""Shrink a failing case or graph while it fails in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable

from pyggml.parity.graph_case import is_graph
from pyggml.parity.shrink_cases import simpler_cases
from pyggml.parity.shrink_graphs import simpler_graphs

#: Candidates to try for one failure.
TRIES = 400
#: Parts of a reason that may differ between failures of one kind.
_NUMBERS = re.compile(r"%\w+|\b[a-z]\d+\b|-?\d+(\.\d+)?(e[-+]\d+)?|'[^']*'|<[^>]*>|\[[^\]]*\]")


def kind_of(why: str) -> str:
    """The kind of a failure: the first words of its reason, without numbers."""
    text = _NUMBERS.sub("#", why.partition(";")[0].partition(", built")[0])
    text = re.sub(r"# within #|NMSE # NOT within #|NMSE inf NOT within #", "NMSE", text)
    return re.sub(r"\s+", " ", text).split(" at ")[0][:60]


def shrunk(
    text: str, why: str, run: Callable[[str], str | None], tries: int = TRIES
) -> tuple[str, str]:
    """(the smallest text found that fails in the same way, its reason)

    run  returns the reason why a text fails, None if it passes
    """
    kind = kind_of(why)
    simpler = simpler_graphs if is_graph(text) else simpler_cases
    seen = {text}
    progress = True
    while progress and tries > 0:
        progress = False
        for candidate in simpler(text):
            if candidate in seen or tries <= 0:
                continue
            seen.add(candidate)
            tries -= 1
            reason = run(candidate)
            if reason is not None and kind_of(reason) == kind:
                text, why, progress = candidate, reason, True
                break
    return text, why
