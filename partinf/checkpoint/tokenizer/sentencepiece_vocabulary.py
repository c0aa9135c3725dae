"""A sentencepiece tokenizer.model, with the special tokens that the files next to it add.

sentencepiece knows no special tokens in a text, so a text is cut at their names first, and each stretch between them is encoded alone.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

from partinf.checkpoint.tokenizer.length import LengthBound
from partinf.checkpoint.tokenizer.marks import Marks
from partinf.checkpoint.tokenizer.pieces import SPACE, piece_bytes
from partinf.checkpoint.tokenizer.settings import AddedToken, Settings, refusing
from partinf.foundation.documents import looks_like, read_bytes

_MAX_BYTES = 1 << 28
# Protocol buffers read a field that is given again as an amendment: these bytes after a model are its normalizer's `add_dummy_prefix`.
_WITH_PREFIX, _WITHOUT_PREFIX = b"\x1a\x02\x18\x01", b"\x1a\x02\x18\x00"


class SentencePieceVocabulary:
    """A tokenizer.model and its added tokens.

    `add_prefix_space` says whether a text is given a space to begin with, and the model does where the files do not. `legacy` says whether
    every stretch between special tokens is given one; files without the key are of a time in which all were.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        import sentencepiece

        data = read_bytes(path, most=_MAX_BYTES)
        with refusing(f"{path}: not a sentencepiece model that can be read{looks_like(data[:64])}"):
            self._backend: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
            self._pieces: list[str] = self._backend.id_to_piece(list(range(self._backend.get_piece_size())))
            own = self._backend.encode("a", out_type=str)[0].startswith(SPACE)
            self.strip_start = own if settings.add_prefix_space is None else settings.add_prefix_space
            later = self.strip_start and settings.legacy is not False
            variant = _WITHOUT_PREFIX if own else _WITH_PREFIX
            other = self._backend
            if own != self.strip_start or own != later:
                other = sentencepiece.SentencePieceProcessor(model_proto=data + variant)
        self._first, self._later = (self._backend if wanted == own else other for wanted in (self.strip_start, later))
        marks = [piece for token, piece in enumerate(self._pieces) if piece and self._backend.is_control(token)]
        self._added = {token.id: token for token in settings.added}
        self.vocab_size = max([len(self._pieces), *(token + 1 for token in self._added)])
        self._added_ids = {token.content: token.id for token in settings.added}
        named = {name: token for name in settings.specials if (token := self.find(name)) is not None}
        self._specials = set(named.values()) | {token.id for token in settings.added if token.special}
        self._specials -= {self._backend.unk_id()}  # one that is sampled stands for some unknown text
        found = {name: AddedToken(token, name, True) for name, token in named.items()}
        found |= {name: AddedToken(self._backend.piece_to_id(name), name, True) for name in marks}
        if (unknown := self._backend.unk_id()) >= 0 and self._pieces[unknown]:
            found[self._pieces[unknown]] = AddedToken(unknown, self._pieces[unknown], True)
        with refusing(f"{path.parent}: special tokens that cannot be searched for"):
            self._marks = Marks(found | {token.content: token for token in settings.added})
        self.bos_id, self.eos_id = self._role(settings, "bos_token"), self._role(settings, "eos_token")
        # transformers adds BOS for sentencepiece models unless configured not to.
        self.adds_bos = self.bos_id is not None and settings.add_bos is not False
        self.adds_eos = settings.add_eos is True

    def _role(self, settings: Settings, role: str) -> int | None:
        name = settings.names.get(role)
        found = None if name is None else self.find(name)
        own: int = self._backend.bos_id() if role == "bos_token" else self._backend.eos_id()
        return found if found is not None else own if own >= 0 else None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        with refusing("the tokenizer cannot encode this text"):
            for place, part in enumerate(self._marks.split(text)):
                if isinstance(part, int):
                    ids.append(part)
                elif part:
                    ids += (self._later if place else self._first).encode(part)
        return ids

    def least_tokens(self, text: str, enough: int) -> int:
        num_marks, parts = 0, list[bytes]()
        for place, part in enumerate(self._marks.split(text)):
            if isinstance(part, int):
                num_marks += 1
                if num_marks > enough:
                    break
            elif part:
                parts.append((self._later if place else self._first).normalize(part).encode())
        return num_marks + self._bound.least(*parts)

    @functools.cached_property
    def _bound(self) -> LengthBound:
        backend = self._backend
        used = [(token, piece) for token, piece in enumerate(self._pieces) if not backend.is_unused(token)]
        counted: Collection[int] = range(256)
        if len({piece for token, piece in used if backend.is_byte(token)}) < 256:
            # Several characters without a piece become one unknown token.
            counted = {ord(piece) for _, piece in used if len(piece) == 1 and piece.isascii()}
        return LengthBound([piece.encode() for _, piece in used], counted)

    def name(self, token: int) -> str:
        if token in self._added:
            return self._added[token].content
        return self._pieces[token] if 0 <= token < len(self._pieces) else ""

    def find(self, token: str) -> int | None:
        if token in self._added_ids:
            return self._added_ids[token]
        found: int = self._backend.piece_to_id(token)
        return found if 0 <= found < len(self._pieces) and self._pieces[found] == token else None

    def token_bytes(self, token: int) -> bytes:
        if token in self._specials:
            return b""
        if token in self._added and token != self._backend.unk_id():
            return self._added[token].content.encode()
        if not 0 <= token < len(self._pieces) or self._backend.is_control(token):
            return b""
        if self._backend.is_unknown(token):
            return self._backend.decode([token]).encode()
        return piece_bytes(self._pieces[token], self._backend.is_byte(token))
