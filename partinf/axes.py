"""The one notation: letters for tensor dimensions, names for mesh axes, and shapes written as `B_x L E_yz {z unreduced}`.

The letters are those of "Efficiently Scaling Transformer Inference" (Pope et al., 2023, section 3.1), extended where the paper has
none. A subscript lists the mesh axes that split the dimension, major first; a dimension without one is whole on every device. Braces
list axes over which the tensor is still to be summed. In code comments the same shape is written `[B.x, L, E.yz] {z unreduced}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from partinf.foundation.errors import InvalidInput

LETTERS: Mapping[str, str] = {
    "B": "batch: sequences of one pass",
    "L": "length of this pass in tokens (1 in decode)",
    "T": "tokens of this pass, flat: B and L together",
    "M": "context length: tokens in the KV cache",
    "E": "d_model, the embedding dimension",
    "F": "d_ff, the hidden dimension of the FFN",
    "H": "query heads",
    "K": "key-value heads",
    "Q": "d_head",
    "V": "vocabulary, padded",
    "N": "layers",
    "P": "pages of the KV cache",
    "S": "positions within a page",
}

_AXIS = re.compile(r"[a-z][0-9]*")
_NAME = re.compile(r"[a-z][a-z0-9]*")


def join_axes(names: tuple[str, ...]) -> str:
    """`("x0", "y", "dcn")` → `"x0y{dcn}"`: names of several letters stand in braces."""
    return "".join(name if _AXIS.fullmatch(name) else f"{{{name}}}" for name in names)


def is_axis_name(name: str) -> bool:
    """Whether `name` may name a mesh axis: lower-case letters and digits, beginning with a letter."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class ShardedShape:
    """A tensor's dimensions, the mesh axes that split each, and the axes over which it is still unreduced.

    Attributes:
        dims: (letter, axes) per dimension, axes major first.
        unreduced: axes whose partial sums are still to be added.
    """

    dims: tuple[tuple[str, tuple[str, ...]], ...]
    unreduced: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [letter for letter, _ in self.dims if letter not in LETTERS]
        used = [axis for _, axes in self.dims for axis in axes] + list(self.unreduced)
        twice = sorted({axis for axis in used if used.count(axis) > 1})
        offences = [f"'{self}': unknown dimension letter '{letter}'; letters: {' '.join(LETTERS)}" for letter in unknown]
        offences += [f"'{self}': axis '{axis}' is used more than once" for axis in twice]
        if offences:
            raise InvalidInput(offences)

    def __str__(self) -> str:
        words = [letter + (f"_{join_axes(axes)}" if axes else "") for letter, axes in self.dims]
        tail = f" {{{join_axes(self.unreduced)} unreduced}}" if self.unreduced else ""
        return " ".join(words) + tail
