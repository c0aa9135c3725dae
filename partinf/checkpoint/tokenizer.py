"""Text to token ids and back, from a tokenizer.json or a sentencepiece tokenizer.model.

Owns what the two formats have in common for the Llama family: an id stands for some bytes, and text is the bytes of its ids read as UTF-8.
Detokenizing by bytes instead of by repeated decoding makes a stream cost the same per token however long the text is, never splits a
character, and makes the pieces of a stream add up to `decode` of its ids whatever the ids are. jax is not imported.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from partinf.errors import InvalidInput, raise_offences

JSON_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"  # how sentencepiece writes a space inside a piece
_DECODERS_OF_WORDS = {"WordPiece", "CTC", "BPEDecoder"}  # they join words by rules that bytes per id do not express


class Vocabulary(Protocol):
    """What a format provides; `strip_start` says that the space before the first word was added by encoding."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    strip_start: bool

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens added."""

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which special tokens stand by their names."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for; none for special tokens and ids without a token."""

    def name(self, token: int) -> str:
        """The token as its file calls it; empty for ids without a token."""

    def find(self, token: str) -> int | None:
        """The id of a token by its name."""


class TokenStream:
    """Detokenizes one sequence as its ids arrive, in constant time per id."""

    def __init__(self, vocabulary: Vocabulary, continuation: bool) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = vocabulary.strip_start and not continuation

    def push(self, token: int) -> str:
        """The text that this id completes: empty while a character's bytes are still arriving."""
        return self._emit(self._decoder.decode(self._vocabulary.token_bytes(token)))

    def finish(self) -> str:
        """What is left when the sequence ends: a replacement character where it ends inside a character, and otherwise nothing."""
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text


class Tokenizer:
    """Text ↔ ids of one model.

    Attributes:
        vocab_size: Number of ids; the model's vocabulary may be padded beyond it.
        bos_id: Id that begins a sequence, or None.
        eos_ids: Ids that end one.
    """

    def __init__(self, vocabulary: Vocabulary, eos_ids: Iterable[int]) -> None:
        self._vocabulary = vocabulary
        self.vocab_size = vocabulary.vocab_size
        self.bos_id = vocabulary.bos_id
        self.eos_ids = frozenset(eos_ids)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Ids of a text, begun by BOS where the model's files say so, or as `add_bos` says."""
        wanted = self._vocabulary.adds_bos if add_bos is None else add_bos
        if wanted and self.bos_id is None:
            raise InvalidInput("add_bos: this tokenizer has no BOS token; encode without it")
        ids = self._vocabulary.encode(text)
        return [self.bos_id, *ids] if wanted and self.bos_id is not None else ids

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which special tokens stand by their names (`<s>`), as chat templates write it; no BOS is added."""
        return self._vocabulary.encode_marked(text)

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

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """Text of ids, special tokens left out; bytes that are no UTF-8 become replacement characters.

        Where encoding puts a space before the first word (sentencepiece), it is taken away again, unless the ids continue other text.
        """
        stream = self.stream(continuation=continuation)
        return "".join([*(stream.push(token) for token in ids), stream.finish()])

    def stream(self, *, continuation: bool = False) -> TokenStream:
        """An incremental `decode`: the pushed pieces and `finish()` add up to it."""
        return TokenStream(self._vocabulary, continuation)


def _byte_level_alphabet() -> dict[str, int]:
    """Character → byte of GPT-2's byte-level BPE: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class _JsonVocabulary:
    """A tokenizer.json, of byte-level BPE or of pieces with byte fallback."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            text = path.read_text(encoding="utf-8")
            layout = json.loads(text)
            self._backend = Backend.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception for everything that it cannot read
            raise InvalidInput(f"{path}: not a tokenizer that can be read ({error})") from error
        # A file may carry the limits of some training run, which would cut prompts silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        steps = _steps(layout.get("decoder"))
        kinds = {str(step.get("type")) for step in steps}
        unsupported = sorted(kinds & _DECODERS_OF_WORDS)
        if unsupported:
            raise InvalidInput(f"{path}: the decoder {', '.join(unsupported)} is not supported; expected ByteLevel or ByteFallback")
        self._alphabet = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._has_byte_pieces = "ByteFallback" in kinds
        self._added = {token["id"]: token for token in layout.get("added_tokens", ())}
        self.strip_start = "Strip" in kinds or any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_id = self._named(settings, "bos_token"), self._named(settings, "eos_token")
        begun = self._begun_by_post_processor()
        self.bos_id = begun if self.bos_id is None else self.bos_id
        explicit = settings.get("add_bos_token")
        self.adds_bos = self.bos_id is not None and (explicit if isinstance(explicit, bool) else begun == self.bos_id)

    def _begun_by_post_processor(self) -> int | None:
        """The id that the file's post-processor puts before a text."""
        plain, full = (self._backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        return full[0] if full[: len(plain)] != plain else None

    def _named(self, settings: Mapping[str, Any], key: str) -> int | None:
        name = _token_name(settings.get(key))
        return None if name is None else self.find(name)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    encode_marked = encode  # the backend finds special tokens in any text

    def name(self, token: int) -> str:
        return (self._backend.id_to_token(token) if token >= 0 else None) or ""

    def find(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return b"" if self._added[token]["special"] else self._added[token]["content"].encode()
        piece = self._backend.id_to_token(token) if 0 <= token < self.vocab_size else None
        if piece is None:
            return b""
        if self._alphabet is None:
            return _piece_bytes(piece, self._has_byte_pieces)
        # A token added outside the alphabet stands for itself.
        known = all(character in self._alphabet for character in piece)
        return bytes(self._alphabet[character] for character in piece) if known else piece.encode()


class _SentencePieceVocabulary:
    """A sentencepiece tokenizer.model."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        import sentencepiece

        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise InvalidInput(f"{path}: not a sentencepiece model that can be read ({error})") from error
        self.vocab_size = self._backend.get_piece_size()
        self.bos_id = self._backend.bos_id() if self._backend.bos_id() >= 0 else None
        self.eos_id = self._backend.eos_id() if self._backend.eos_id() >= 0 else None
        # transformers adds BOS for sentencepiece models unless it is told not to.
        self.adds_bos = self.bos_id is not None and settings.get("add_bos_token", True) is not False
        # Whether encoding puts a space before the first word is in the model; its effect tells.
        self.strip_start = self._backend.encode("a", out_type=str)[0].startswith(_SPACE)
        control = (self._backend.id_to_piece(token) for token in range(self.vocab_size) if self._backend.is_control(token))
        self._marks = re.compile("(" + ("|".join(map(re.escape, control)) or "(?!)") + ")")

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text)

    def encode_marked(self, text: str) -> list[int]:
        # Splitting by a group: what stands at odd places are the marks.
        parts = enumerate(self._marks.split(text))
        return [token for place, part in parts for token in ([self._backend.piece_to_id(part)] if place % 2 else self.encode(part))]

    def name(self, token: int) -> str:
        return self._backend.id_to_piece(token) if 0 <= token < self.vocab_size else ""

    def find(self, token: str) -> int | None:
        found = self._backend.piece_to_id(token)
        return None if self._backend.id_to_piece(found) != token else found

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size or self._backend.is_control(token):
            return b""
        if self._backend.is_unknown(token):
            return self._backend.decode([token]).encode()
        return _piece_bytes(self._backend.id_to_piece(token), self._backend.is_byte(token))


def _piece_bytes(piece: str, may_be_byte: bool) -> bytes:
    match = _BYTE_PIECE.fullmatch(piece) if may_be_byte else None
    return bytes([int(match.group(1), 16)]) if match else piece.replace(_SPACE, " ").encode()


def _steps(decoder: Any) -> list[Mapping[str, Any]]:
    """The decoders of a tokenizer.json in order, sequences unrolled."""
    if not isinstance(decoder, Mapping):
        return []
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder.get("decoders", ()) for step in _steps(inner)]
    return [decoder]


def _token_name(value: Any) -> str | None:
    """A token as tokenizer_config.json names it: a string, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_optional(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or nothing where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: not JSON ({error}); expected an object") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{path}: found a JSON {type(value).__name__}; expected an object")
    return value


def _eos_ids(directory: Path, settings: Mapping[str, Any], vocabulary: Vocabulary) -> list[int]:
    """Ids that end a sequence, from the first source that names any, in the order in which transformers' generation looks.

    That is generation_config.json, config.json, then the tokenizer's own.
    """
    for name in ("generation_config.json", "config.json"):
        value = _read_optional(directory / name).get("eos_token_id")
        if value is None or value == []:
            continue
        ids: list[int] = value if isinstance(value, list) else [value]
        bad = [item for item in ids if not isinstance(item, int) or isinstance(item, bool)]
        raise_offences(f"{directory / name}: eos_token_id holds {item!r}; expected an id or a list of ids" for item in bad)
        return ids
    named = _token_name(settings.get("eos_token"))
    found = vocabulary.find(named) if named is not None else None
    own = found if found is not None else vocabulary.eos_id
    return [] if own is None else [own]


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory: tokenizer.json, or else a sentencepiece tokenizer.model.

    `tokenizer_config.json` says whether BOS is added (`add_bos_token`); where it does not, the post-processor of tokenizer.json does, and
    sentencepiece models add it.

    Raises:
        InvalidInput: neither file is there, or one that is there cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InvalidInput(f"{directory}: no such directory; expected one with {JSON_FILE} or {SENTENCEPIECE_FILE}")
    settings = _read_optional(directory / "tokenizer_config.json")
    vocabulary: Vocabulary
    if (directory / JSON_FILE).is_file():
        vocabulary = _JsonVocabulary(directory / JSON_FILE, settings)
    elif (directory / SENTENCEPIECE_FILE).is_file():
        vocabulary = _SentencePieceVocabulary(directory / SENTENCEPIECE_FILE, settings)
    else:
        present = ", ".join(sorted(file.name for file in directory.iterdir())[:8]) or "nothing"
        raise InvalidInput(f"{directory}: no tokenizer: found {present}; expected {JSON_FILE} or {SENTENCEPIECE_FILE}")
    return Tokenizer(vocabulary, _eos_ids(directory, settings, vocabulary))
