"""Command lines made of others: a flag that is given twice is refused, so that a test changes one by taking its place."""

from __future__ import annotations

from collections.abc import Sequence


def with_flags(base: Sequence[str], *flags: str) -> list[str]:
    """The words of `base`, without the flags (and their values) that come again among `flags`, and then those."""
    again = {word.partition("=")[0] for word in flags if word.startswith("--")}
    kept: list[str] = []
    dropping = False
    for word in base:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in again
        if not dropping:
            kept.append(word)
    return [*kept, *flags]
