"""Text ↔ ids, whatever the format of the vocabulary.

Detokenizing by bytes instead of by repeated decoding makes a stream cost the same per token however long the text is, never splits a
character, and makes the pieces of a stream add up to `decode` of its ids whatever the ids are.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from partinf.checkpoint.tokenizer.ends import Ends
from partinf.checkpoint.tokenizer.vocabulary import Vocabulary
from partinf.foundation.errors import InvalidInput

_PLAIN_CHARACTERS = 4  # per token: a text that is no longer than that is encoded as it is, a longer one is measured first
# A text of which no bound is known (accents without letters that a normalizer puts in order) is judged by its beginning: so many
# characters at least, and so many per token of room.
_BEGINNING, _BEGINNING_PER_TOKEN = 1 << 16, 4


class TokenStream:
    """Detokenizes one sequence as its ids arrive, in constant time per id."""

    def __init__(self, vocabulary: Vocabulary, continuation: bool, special: bool = False) -> None:
        self._bytes = (
            (lambda token: vocabulary.token_bytes(token) or vocabulary.name(token).encode()) if special else vocabulary.token_bytes
        )
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = vocabulary.strip_start and not continuation

    def push(self, token: int) -> str:
        """The text that this id completes: empty while a character's bytes are still arriving."""
        return self._emit(self._decoder.decode(self._bytes(token)))

    def finish(self) -> str:
        """What is left when the sequence ends: a replacement character where it ends inside a character, and otherwise nothing."""
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text


class TooLong(InvalidInput):
    """A text that is sure to have more tokens than there is room for; it was not encoded."""


class Tokenizer:
    """Text ↔ ids of one model.

    A special token that stands in a text by its name (`<s>`) is that token, in plain prompts as in conversations and with either format,
    as transformers and vLLM have it. Text from strangers that must not hold any has to be searched for them before.

    Attributes:
        vocab_size: Number of ids; the model's vocabulary may be padded beyond it.
        bos_id: Id that begins a sequence, or None.
        eos_ids: Ids that end one.
        eos_note: A line for the user who starts the model, where it is not plain which ids those are; else None.
    """

    def __init__(self, vocabulary: Vocabulary, ends: Ends) -> None:
        self._vocabulary = vocabulary
        self.vocab_size = vocabulary.vocab_size
        self.bos_id = vocabulary.bos_id
        self.eos_ids = ends.ids
        self.eos_note = ends.note

    def encode(self, text: str, *, add_bos: bool | None = None, limit: int | None = None) -> list[int]:
        """Ids of a text, begun by BOS and ended by EOS where the model's files say so, the former as `add_bos` says where it is given.

        Args:
            limit: the most ids that there is room for. A text that is sure to have more is refused before it is encoded; whether another
                one fits, the number of its ids says.

        Raises:
            TooLong: a text that is sure to have more than `limit` ids.
            InvalidInput: half of a surrogate pair, or `add_bos` without a BOS token.
        """
        begun = self._vocabulary.adds_bos if add_bos is None else add_bos
        if begun and self.bos_id is None:
            raise InvalidInput("add_bos: this tokenizer has no BOS token; encode without it")
        start = [self.bos_id] if begun and self.bos_id is not None else []
        eos = self._vocabulary.eos_id
        end = [eos] if self._vocabulary.adds_eos and eos is not None else []
        return [*start, *self._encode(text, None if limit is None else limit - len(start) - len(end), len(start) + len(end)), *end]

    def encode_marked(self, text: str, *, limit: int | None = None) -> list[int]:
        """Ids of a text that names all its special tokens itself, as chat templates write it: no BOS and no EOS is added.

        Args, Raises: as `encode`.
        """
        return self._encode(text, limit, 0)

    def _encode(self, text: str, room: int | None, added: int) -> list[int]:
        if not text.isascii() and not _is_unicode(text):
            raise InvalidInput("the text holds half of a surrogate pair, which is no Unicode text")
        if room is not None and len(text) > _PLAIN_CHARACTERS * max(room, 0):
            least = self._vocabulary.least_tokens(text, room)
            beginning = max(_BEGINNING, _BEGINNING_PER_TOKEN * room)
            if least <= room and len(text) > 4 * beginning:
                # The ids of a beginning are those of the text but for the last few, so half of them is a safe bound.
                least = max(least, len(self._vocabulary.encode(text[:beginning])) // 2)
            if least > room:
                raise TooLong(f"the text has at least {least + added} tokens, more than the {room + added} that fit")
        return self._vocabulary.encode(text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id adds to a text: none for special tokens, part of a character for some."""
        return self._vocabulary.token_bytes(token)

    def token_text(self, token: int) -> str:
        """An id for a reader: its text, the name of a special token, or `bytes:\\xe2\\x89` where it is part of a character."""
        piece = self.token_bytes(token)
        try:
            return piece.decode() if piece else self._vocabulary.name(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def decode(self, ids: Iterable[int], *, continuation: bool = False, special: bool = False) -> str:
        """Text of ids, special tokens left out, or written by their names where `special`; bytes that are no UTF-8 become replacement
        characters.

        Where encoding puts a space before the first word (sentencepiece), it is taken away again, unless the ids continue other text.
        """
        stream = self.stream(continuation=continuation, special=special)
        return "".join([*(stream.push(token) for token in ids), stream.finish()])

    def stream(self, *, continuation: bool = False, special: bool = False) -> TokenStream:
        """An incremental `decode`: the pushed pieces and `finish()` add up to it."""
        return TokenStream(self._vocabulary, continuation, special)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
