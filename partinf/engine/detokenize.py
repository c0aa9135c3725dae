"""Tokens to text while they arrive, ended by stop strings of which no part is ever given out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol


class TokenStream(Protocol):
    """Detokenizes one sequence: the pieces of `push` and `finish` add up to its text."""

    def push(self, token: int, /) -> str: ...

    def finish(self) -> str: ...


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer (`partinf.checkpoint.tokenizer.Tokenizer` is one)."""

    @property
    def eos_ids(self) -> Collection[int]: ...

    def encode(self, text: str, /, *, limit: int | None = None) -> list[int]:
        """Ids of a text. `InvalidInput` if it cannot be encoded, and, at once, if it is sure to have more than `limit`."""
        ...

    def stream(self, *, continuation: bool, special: bool = False) -> TokenStream:
        """`continuation`: the tokens go on after other text, so a space before the first word is text. `special`: special tokens are
        written by their names."""
        ...


class StopStrings:
    """Finds the first stop string in text that arrives in pieces, wherever the pieces are cut.

    The first is the one that is complete first; of several that end at the same character, the longest. What might be the beginning of
    a stop string is held back until the next piece decides.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, piece: str, may_end: bool = True) -> str:
        """The text that is certain to stand before any stop string. After the end of a stop string there is none.

        Args:
            may_end: whether a stop string that is complete with this piece ends the text.
        """
        if self.found:
            return ""
        text = self._held + piece
        ends = [(start + len(string), start) for string in self._strings if (start := text.find(string)) >= 0]
        if ends and may_end:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((longest_beginning(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What is held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


def longest_beginning(text: str, string: str) -> int:
    """Length of the longest end of `text` that is a beginning of `string`, but not all of it."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)


class TextReader:
    """The text of one sequence, token by token, up to its first stop string. Without a token stream it is always empty."""

    def __init__(self, stream: TokenStream | None, stop: Iterable[str]) -> None:
        self._stream = stream
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """A stop string is complete."""
        return self._stop.found

    def push(self, token: int, may_end: bool = True) -> str:
        return "" if self._stream is None else self._stop.push(self._stream.push(token), may_end)

    def finish(self, may_end: bool = True) -> str:
        """The rest of the text: bytes that never became a character, and what was held back for a stop string."""
        return "" if self._stream is None else self._stop.push(self._stream.finish(), may_end) + self._stop.finish()
