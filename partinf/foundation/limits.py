"""The ranges in which the code is right, one number each with its reason.

A number from a user is compared with its range where it enters (`Workload`, `Capacity`, `Sizing`, a slice, a trace, a description, a flag),
after it was converted to the type that is computed with, and before anything of its size is made. What is out of range is `InvalidInput`.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final

from partinf.foundation.documents import shown

# Positions are counted in float32 by the rotation, which holds whole numbers exactly up to here.
MAX_LEN: Final = 1 << 24
"""Tokens of one request, prompt and output together; also prompt tokens of one step, and tokens of a page."""

# The scheduler keeps lists of as many entries.
MAX_BATCH: Final = 1 << 20
"""Sequences decoded together, or resident."""

# Number of tokens from which a plan runs the prefill phase's roles. A step's rows are 32-bit numbers.
MAX_TOKENS: Final = 1 << 30
NEVER: Final = MAX_TOKENS
"""As such a number: no step has as many, so the roles of decode run always."""

# The pool keeps some 44 bytes for each, for its own list of free ones and the count of holders.
MAX_PAGES: Final = 1 << 23
"""KV pages of all shards together, and as many of host memory."""

MAX_HOST_BYTES: Final = 1e15  # per chip; a thousand times what a machine has

# Dimensions of arrays, and so every size of a model, are signed 32-bit numbers in the compiler's kernels.
MAX_SIZE: Final = (1 << 31) - 1

MAX_DEVICES: Final = 1 << 20  # more than any network of chips has; axes are walked to their length here and there
MAX_AXES: Final = 16  # of a mesh; assignments of roles grow as a power of it, and no real mesh has half as many

# One that arrives is some 200 bytes before it is served, and some kilobytes after.
MAX_REQUESTS: Final = 1_000_000
MAX_PROMPT_TOKENS: Final = 1 << 22  # that a description draws: 40 bytes each

# On a clock that counts seconds in float64, steps of a microsecond still add up exactly enough at its end (after 30 years).
MAX_SECONDS: Final = 1e9
MIN_RATE, MAX_RATE = 1e-6, 1e9  # events per second: so that a thousand gaps stay within that time, and one gap is no less than a rounding
MIN_VARIATION, MAX_VARIATION = 1e-3, 1e3  # coefficient of variation of the gaps: their gamma distribution can be drawn from

# Limits of one request: all are dimensions of arrays in every program with extended sampling.
TOP_LOGPROBS: Final = 20  # alternatives per token
MAX_BIASES: Final = 1024  # logit biases
MAX_ENDS: Final = 128  # tokens that end a text, where it must not end before some length

_WHOLE = re.compile(r"[+-]?[0-9]{1,400}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})([eE][+-]?[0-9]{1,9})?")


def outside(name: str, value: float, low: float, high: float) -> list[str]:
    """The offence of a number that is not in low..high (what is no number is in no range); an empty list where it is."""
    if low <= value <= high:
        return []
    bound = f"at most {high:,}" if value > high else f"at least {low:,}"
    return [f"{name} = {shown(value)}; it must be {bound}"]


def not_whole(name: str, value: Any, low: int, high: int) -> list[str]:
    """The same for a size or count, which 8.0 and True are not."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return [f"{name} = {shown(value)}; a whole number is needed"]
    return outside(name, int(value), low, high)


def whole_of(text: str) -> int | None:
    """The whole number that a text is: decimal digits of ASCII, perhaps after a sign; None for anything else."""
    return int(text) if _WHOLE.fullmatch(text) else None


def number_of(text: str) -> float | None:
    """The finite number that a text is, in decimal digits of ASCII; None for anything else, and where a float cannot hold it."""
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value + 0.0 if math.isfinite(value) else None  # -0.0 + 0.0 is 0.0
