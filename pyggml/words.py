"""Numbers and nouns in messages."""

from __future__ import annotations


def counted(n: int, one: str, many: str = "") -> str:
    """`1 step`, `2 steps`; give `many` if the plural is not `one` with an s."""
    return f"{n} {one if n == 1 else many or one + 's'}"
