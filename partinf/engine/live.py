"""A sample of a request in flight, as the engine sees it: its sequence, its text, and where its events go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from partinf.engine.constraint import Constraint
from partinf.engine.detokenize import TextReader
from partinf.engine.request import FinishReason, Sequence, TokenEvent

OnToken = Callable[[TokenEvent], None]


@dataclass(eq=False)
class Live:
    """A sample of a request in flight, with what only the engine needs of it.

    Attributes:
        reader: None without a tokenizer. full_len: length of `Sequence.tokens` at which it ends. reported: `step` returns its output.
        constraint: to what it is held, in the process that takes the requests.
    """

    sequence: Sequence
    reader: TextReader | None
    end_tokens: frozenset[int]
    full_len: int
    on_token: OnToken | None
    reported: bool
    constraint: Constraint | None = None

    def rest(self) -> str:
        """The text that was held back because it might have become a character, or a stop string."""
        return "" if self.reader is None else self.reader.finish()

    def read(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that a sampled token adds, and whether it ends the request."""
        reader, full = self.reader, len(self.sequence.tokens) == self.full_len
        if token in self.end_tokens:
            return self.rest(), FinishReason.STOP
        if reader is None:
            return "", FinishReason.LENGTH if full else None
        text = reader.push(token, self.sequence.num_generated > self.sequence.request.params.min_tokens)
        if reader.stopped:
            return text, FinishReason.STOP
        return (text + reader.finish(), FinishReason.LENGTH) if full else (text, None)
