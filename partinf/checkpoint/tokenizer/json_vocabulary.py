"""A tokenizer.json, of byte-level BPE or of pieces with byte fallback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from partinf.checkpoint.tokenizer.length import LengthBound
from partinf.checkpoint.tokenizer.pieces import byte_level_alphabet, piece_bytes
from partinf.checkpoint.tokenizer.seen import seen_by_model, steps
from partinf.checkpoint.tokenizer.settings import Settings, refusing
from partinf.foundation.documents import looks_like, read_text
from partinf.foundation.errors import InvalidInput, raise_offences

_MAX_BYTES = 1 << 28
_DECODERS_OF_WORDS = {"WordPiece", "CTC", "BPEDecoder"}  # they join words by rules that bytes per id do not express
_LONG = 1024  # characters; `encode` holds the interpreter meanwhile, and the batch of one that does not costs a microsecond


class JsonVocabulary:
    """A tokenizer.json. Tokens that only the files next to it add are added here as well."""

    def __init__(self, path: Path, settings: Settings) -> None:
        from tokenizers import Tokenizer as Backend

        text = read_text(path, most=_MAX_BYTES)
        with refusing(f"{path}: not a tokenizer that can be read{looks_like(text[:64].encode())}"):
            self._backend: Any = Backend.from_str(text)
            # A file may carry the limits of some training run, which would cut prompts silently.
            self._backend.no_truncation()
            self._backend.no_padding()
            if not self._backend.get_vocab_size(with_added_tokens=False):
                raise InvalidInput(f"{path}: its vocabulary is empty")
            self._add(path, settings)
            self._read_decoder(path)
            self._added: dict[int, Any] = self._backend.get_added_tokens_decoder()
            self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
            begun, ended = self._put_by_post_processor()
        bos, eos = (self._named(settings, role) for role in ("bos_token", "eos_token"))
        self.bos_id, self.eos_id = begun if bos is None else bos, eos
        self.adds_bos = self.bos_id is not None and (begun == self.bos_id if settings.add_bos is None else settings.add_bos)
        self.adds_eos = eos is not None and (ended == eos if settings.add_eos is None else settings.add_eos)

    def _add(self, path: Path, settings: Settings) -> None:
        """Adds what the files next to this one name, and marks as special what they name so."""
        from tokenizers import AddedToken

        offences = []
        for token in settings.added:
            if self.find(token.content) is None:
                flags = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": token.normalized}
                self._backend.add_tokens([AddedToken(token.content, special=token.special, **flags)])
                found = self.find(token.content)
                if found != token.id:
                    offences.append(f"{path.parent}: {token.content!r} is to be added as id {token.id}; the next free id is {found}")
        raise_offences(offences)
        known = {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}
        plain = sorted(name for name in settings.specials - known if self.find(name) is not None)
        self._backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in plain])

    def _read_decoder(self, path: Path) -> None:
        decoders = steps(self._backend.decoder, "decoders")
        kinds = {step["type"] for step in decoders}
        unsupported = sorted(kinds & _DECODERS_OF_WORDS)
        if unsupported:
            raise InvalidInput(f"{path}: the decoder {', '.join(unsupported)} is not supported; expected ByteLevel or ByteFallback")
        self._alphabet = byte_level_alphabet() if "ByteLevel" in kinds else None
        self._has_byte_pieces = "ByteFallback" in kinds
        self.strip_start = "Strip" in kinds or any(
            step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in decoders
        )

    def _put_by_post_processor(self) -> tuple[int | None, int | None]:
        """The first of the ids that the file's post-processor puts before a text, and the last of those that it puts after it."""
        plain, full = (self._backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = (start for start in range(len(full) - len(plain) + 1) if full[start : start + len(plain)] == plain)
        start = next(starts, 0)
        before, after = full[:start], full[start + len(plain) :]
        return before[0] if before else None, after[-1] if after else None

    def _named(self, settings: Settings, role: str) -> int | None:
        name = settings.names.get(role)
        return None if name is None else self.find(name)

    def encode(self, text: str) -> list[int]:
        with refusing("the tokenizer cannot encode this text"):
            if len(text) < _LONG:
                short: list[int] = self._backend.encode(text, add_special_tokens=False).ids
                return short
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
            long: list[int] = encoding.ids
            return long

    def least_tokens(self, text: str, enough: int) -> int:
        with refusing("the tokenizer cannot measure this text"):
            if self._bound is None:
                return 0
            bound, seen = self._bound
            return bound.least(seen(text).encode())

    @functools.cached_property
    def _bound(self) -> tuple[LengthBound, Callable[[str], str]] | None:
        """The bound, and how the model sees a text; None where text may vanish, or many characters become one unknown token."""
        seen = seen_by_model(self._backend)
        if seen is None:
            return None
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        added = {token.content for token in self._added.values()}
        byte_level = any(step["type"] == "ByteLevel" for step in steps(self._backend.pre_tokenizer, "pretokenizers"))
        alphabet = byte_level_alphabet()
        if byte_level:
            counted = {byte for character, byte in alphabet.items() if character in vocab}
            table = str.maketrans({character: chr(byte) for character, byte in alphabet.items()})
            tokens = [piece.translate(table).encode("latin-1", "ignore") for piece in vocab if piece not in added]
        else:
            spelled = {byte for byte in range(256) if f"<0x{byte:02X}>" in vocab} if self._backend.model.byte_fallback else set()
            counted = {byte for byte in range(128) if byte in spelled or chr(byte) in vocab}
            counted |= set(range(128, 256)) if spelled >= set(range(128, 256)) else set()
            tokens = [piece.encode() for piece in vocab if piece not in added]
        tokens += [form.encode() for content in added for form in (content, seen(content))]
        if any(token.lstrip or token.rstrip for token in self._added.values()):  # they swallow any number of blanks
            counted -= {byte for byte in range(256) if byte >= 128 or chr(byte).isspace()}
        return LengthBound(tokens, counted), seen

    def name(self, token: int) -> str:
        return (self._backend.id_to_token(token) if 0 <= token < self.vocab_size else None) or ""

    def find(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found

    def token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return b"" if self._added[token].special else self._added[token].content.encode()
        piece = self._backend.id_to_token(token) if 0 <= token < self.vocab_size else None
        if piece is None:
            return b""
        if self._alphabet is None:
            return piece_bytes(piece, self._has_byte_pieces)
        # A token added outside the alphabet stands for itself.
        known = all(character in self._alphabet for character in piece)
        return bytes(self._alphabet[character] for character in piece) if known else piece.encode()
