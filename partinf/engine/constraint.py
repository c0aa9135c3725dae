"""What holds an answer to a grammar, as the engine sees it: which tokens may come next. The compiler of grammars provides it.

A mask is a bit per token, bit i modulo 8 of byte i // 8 for token i; tokens beyond its end may not come. It follows from the last token, so
a sequence that is held to a grammar runs again once the host has seen that: in every second step where the host is a step ahead, while all
others run in every one.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


class Constraint(Protocol):
    """The state of one answer."""

    def accept(self, token: int, quick: bool = False) -> bytes | None:
        """Take the next token, one of those that the last mask had; the mask of those that may follow, or None where the answer is
        complete and nothing may.

        Args:
            quick: the call blocks all requests, so it may be refused.

        Raises:
            Costly: only where it is to be quick; the token has not been taken then.
            Exception: the answer cannot be continued; its request fails, no other.
        """
        ...


@runtime_checkable
class Grammar(Protocol):
    """A grammar, compiled. It never changes, so that any number of requests may have it.

    Attributes:
        first_mask: of the tokens with which an answer may begin; at least one.
    """

    @property
    def first_mask(self) -> bytes: ...

    def start(self) -> Constraint:
        """An answer without any token yet."""
        ...


def allows(mask: bytes, token: int) -> bool:
    """Whether a mask has this token."""
    return token // 8 < len(mask) and bool(mask[token // 8] >> token % 8 & 1)
