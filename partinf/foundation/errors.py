"""The one exception for bad input, which carries every offence, not the first; and the one for input that comes at a bad time.

Everything that checks user input (files, flags, layouts, requests) collects its offences in a list and raises once, before a device
is touched. The command line prints one line per offence and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class InvalidInput(ValueError):
    """Input that cannot be used.

    Attributes:
        offences: One sentence each: what was requested, the offending name and number, the constraint, and what would be valid.
    """

    def __init__(self, offences: str | Iterable[str]) -> None:
        self.offences: tuple[str, ...] = (offences,) if isinstance(offences, str) else tuple(dict.fromkeys(offences))
        super().__init__("\n".join(self.offences))


class DoesNotFit(InvalidInput):
    """What was requested does not fit in memory."""


class Overloaded(RuntimeError):
    """A request that was refused because too much is waiting; nothing was queued.

    Attributes:
        retry_after: estimated seconds until there is room.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class Costly(Exception):
    """The mask of an answer under a grammar takes longer to compute than other requests should wait."""


class NotFinite(ArithmeticError):
    """The model's logits for a request, or for a text to be scored, are NaN or infinite. Other requests are not affected."""

    def __init__(self, num_tokens: int) -> None:
        """
        Args:
            num_tokens: how many came before the token whose logits they are.
        """
        super().__init__(
            f"the model's logits after {num_tokens} tokens are NaN or infinite; "
            "its weights contain such values, or its activations overflow their type"
        )


def raise_offences(offences: Iterable[str]) -> None:
    """Raise `InvalidInput` if there is any offence."""
    found = tuple(offences)
    if found:
        raise InvalidInput(found)


def collect(offences: list[str], make: Callable[[], T]) -> T | None:
    """What `make` returns; if it raises `InvalidInput`, its offences join `offences` and the result is None."""
    try:
        return make()
    except InvalidInput as error:
        offences += error.offences
        return None


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name closest to `name`, or the list of all when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""
