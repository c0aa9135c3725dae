"""What an answer must match, as text that can be compared: equal structures are compiled once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from partinf.foundation.errors import InvalidInput

MAX_CHARACTERS = 1 << 17  # of a structure, written out


class Kind(StrEnum):
    """JSON: by a schema. REGEX: the whole answer matches. CHOICE: one of several texts. GRAMMAR: Lark's or GBNF."""

    JSON = "json"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class Structure:
    """Of an answer.

    Attributes:
        text: a JSON schema, a regular expression (Rust's syntax), a JSON list of texts, or a grammar, as `kind` says.
        spaces: whether JSON may have a space or a new line, with its indentation, where it allows white space; otherwise it has none.

    Raises:
        InvalidInput: too long, or empty.
    """

    kind: Kind
    text: str
    spaces: bool = True

    def __post_init__(self) -> None:
        if not 0 < len(self.text) <= MAX_CHARACTERS:
            raise InvalidInput(f"{self.kind} of {len(self.text)} characters; valid: 1 to {MAX_CHARACTERS}")

    @classmethod
    def json_schema(cls, schema: str | dict[str, Any], spaces: bool = True) -> Structure:
        """JSON by a schema, which may be given as JSON.

        Raises:
            InvalidInput: what cannot be written as JSON, or is too long.
        """
        if isinstance(schema, str):
            return cls(Kind.JSON, schema, spaces)
        try:
            return cls(Kind.JSON, json.dumps(schema), spaces)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"json: the schema cannot be written as JSON: {error}") from None

    @classmethod
    def json_object(cls, spaces: bool = True) -> Structure:
        """Any JSON object."""
        return cls(Kind.JSON, '{"type": "object"}', spaces)

    @classmethod
    def regex(cls, pattern: str) -> Structure:
        """An answer that matches as a whole."""
        return cls(Kind.REGEX, pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Structure:
        """One of these texts.

        Raises:
            InvalidInput: none, or an empty one.
        """
        if not texts or not all(texts):
            raise InvalidInput("choice: at least one text is needed, and none may be empty")
        return cls(Kind.CHOICE, json.dumps(list(texts)))

    @classmethod
    def grammar(cls, text: str) -> Structure:
        """Lark's notation as llguidance reads it, or GBNF."""
        return cls(Kind.GRAMMAR, text)
