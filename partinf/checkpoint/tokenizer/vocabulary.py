"""What the format of a vocabulary provides: ids of texts, and what each id stands for."""

from __future__ import annotations

from typing import Protocol


class Vocabulary(Protocol):
    """What a format provides; `strip_start` says that the space before the first word was added by encoding."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    adds_eos: bool
    strip_start: bool

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens stand by their names, without special tokens added. A long text does not keep other
        threads of the interpreter waiting."""

    def least_tokens(self, text: str, enough: int) -> int:
        """A number of tokens that the encoding of this text does not fall short of, in far less time than encoding takes. More than
        `enough` need not be counted."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for; none for special tokens and ids without a token."""

    def name(self, token: int) -> str:
        """The token as its file calls it; empty for ids without a token."""

    def find(self, token: str) -> int | None:
        """The id of a token by its name."""
