"""Finds tokens by their names in a text, before its vocabulary is used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from partinf.checkpoint.tokenizer.settings import AddedToken

_BLANKS = re.compile(r"\s*")
_WINDOW = 1 << 18  # characters that are searched at once, so that other threads get their turn


class Marks:
    """Finds tokens by their names in a text, the leftmost first, and of several the longest."""

    def __init__(self, tokens: dict[str, AddedToken]) -> None:
        self._tokens = tokens
        self._longest = max(map(len, tokens), default=0)
        self._pattern = re.compile(alternatives(tokens)) if tokens else None

    def split(self, text: str) -> Iterator[str | int]:
        """The stretches of text between tokens, some of them empty, and the ids of the tokens, in order."""
        start = place = 0
        while self._pattern is not None and place < len(text):
            match = self._pattern.search(text, place, place + _WINDOW + self._longest)
            if match is None or match.start() >= place + _WINDOW:
                place += _WINDOW
                continue
            token = self._tokens[match.group()]
            if token.single_word and _adjoins_word(text, match):
                place = match.start() + 1
                continue
            before = text[start : match.start()]
            yield before.rstrip() if token.lstrip else before
            yield token.id
            start = match.end()
            if token.rstrip and (blanks := _BLANKS.match(text, start)):
                start = blanks.end()
            place = start
        yield text[start:]


def _adjoins_word(text: str, match: re.Match[str]) -> bool:
    return any(re.match(r"\w", character) for character in (text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]))


def alternatives(names: Iterable[str]) -> str:
    """A pattern of any of the names that tries every character once, however many names there are: a tree of their beginnings."""
    given = list(names)
    low, high = min(given), max(given)
    common = low[: next((place for place, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))]
    rest: dict[str, list[str]] = {}
    for name in given:
        if len(name) > len(common):
            rest.setdefault(name[len(common)], []).append(name[len(common) :])
    if not rest:
        return re.escape(common)
    branches = "|".join(alternatives(tails) for _, tails in sorted(rest.items()))
    return f"{re.escape(common)}(?:{branches}){'?' if common in given else ''}"
