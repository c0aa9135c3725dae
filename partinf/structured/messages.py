"""The messages between the server and a process that computes masks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from partinf.structured.structure import Structure


@dataclass(frozen=True)
class Bounds:
    """Of what structures may take.

    Attributes:
        compile_seconds, mask_seconds: of a core, once and for a token. memory: bytes of one process, beyond what it takes when it is idle.
        quick_seconds: one that was compiled within this is compiled for the engine's own process too.
        patience: seconds for which an answer of a process is awaited, however busy the machine is.
    """

    compile_seconds: float = 3.0
    mask_seconds: float = 1.0
    memory: int = 1 << 30
    quick_seconds: float = 0.05
    patience: float = 30.0


@dataclass(frozen=True)
class MaskRequest:
    """A structure to compile, or an answer that goes on.

    Attributes:
        answer: its number; 0 asks for no more than to compile. count: tokens that it has.
        tokens: all of them where the structure is given too, otherwise the last.
    """

    answer: int
    count: int
    tokens: Sequence[int]
    structure: Structure | None


class Found(msgspec.Struct):
    """What a process says.

    Attributes:
        mask: of the tokens that may follow; None where none may. seconds: of a core that it took.
        offences: why the structure is refused. error: why the answer cannot go on.
        unknown: the process does not have the answer, or not up to its last token; ask with all of it.
        full: the process has taken so much memory that another should take its place.
    """

    mask: bytes | None = None
    seconds: float = 0.0
    offences: list[str] = []
    error: str = ""
    unknown: bool = False
    full: bool = False
