"""How vocabularies write bytes: sentencepiece's `▁` and `<0x0A>`, and the alphabet of byte-level BPE."""

from __future__ import annotations

import re

SPACE = "▁"  # how sentencepiece writes a space inside a piece
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_bytes(piece: str, may_be_byte: bool) -> bytes:
    """What a piece of sentencepiece stands for."""
    match = _BYTE_PIECE.fullmatch(piece) if may_be_byte else None
    return bytes([int(match.group(1), 16)]) if match else piece.replace(SPACE, " ").encode()


def byte_level_alphabet() -> dict[str, int]:
    """Character → byte of GPT-2's byte-level BPE: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
