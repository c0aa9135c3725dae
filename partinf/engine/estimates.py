"""What a policy may know of the costs of steps and pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimates:
    """What a policy may know of costs, in seconds.

    Attributes:
        first_iteration: tokens of a prompt → its prefill alone. decode: the shortest iteration, one row.
        page_out, page_in: one KV page to host memory and back. pages_for: tokens → pages.
    """

    first_iteration: Callable[[int], float]
    decode: float
    page_out: float = 0.0
    page_in: float = 0.0
    pages_for: Callable[[int], int] = lambda tokens: tokens
