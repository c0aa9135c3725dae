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
_DIM = re.compile(r"(?P<letter>[A-Z])(?:_(?P<axes>(?:\{[a-z0-9]+\}|[a-z][0-9]*)+))?$")


def split_axes(text: str) -> tuple[str, ...]:
    """`"x0yz"` → `("x0", "y", "z")`; names of several letters stand in braces: `"{dcn}x"` → `("dcn", "x")`.

    Raises:
        InvalidInput: if something in `text` is not an axis name.
    """
    names: list[str] = []
    rest = text
    while rest:
        braced = re.match(r"\{([a-z][a-z0-9]*)\}", rest)
        match = braced or _AXIS.match(rest)
        if match is None:
            form = "a letter with an optional number, or a name in braces"
            raise InvalidInput(f"'{text}': '{rest}' does not begin with an axis name ({form})")
        names.append(match.group(1) if braced else match.group(0))
        rest = rest[match.end() :]
    return tuple(names)


def join_axes(names: tuple[str, ...]) -> str:
    """The inverse of `split_axes`."""
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

    def local_shape(self, sizes: Mapping[str, int], axis_sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape on one device, from the size of each letter and of each axis.

        Raises:
            InvalidInput: for every dimension that its axes do not divide.
        """
        shape, offences = [], []
        for letter, axes in self.dims:
            parts = 1
            for axis in axes:
                parts *= axis_sizes[axis]
            if sizes[letter] % parts:
                offences.append(f"'{self}': {letter} = {sizes[letter]} does not divide into {parts} parts")
            shape.append(sizes[letter] // parts)
        if offences:
            raise InvalidInput(offences)
        return tuple(shape)


def parse_shape(text: str) -> ShardedShape:
    """Read `"B_x L E_yz {z unreduced}"`; the inverse of `str(ShardedShape)`.

    Raises:
        InvalidInput: naming every word that is not of that form.
    """
    unreduced: tuple[str, ...] = ()
    body = text.strip()
    tail = re.search(r"\{([^\s]+) unreduced\}$", body)
    if tail:
        unreduced = split_axes(tail.group(1))
        body = body[: tail.start()].strip()
    dims, offences = [], []
    for word in body.split():
        match = _DIM.match(word)
        if match is None:
            offences.append(f"'{text}': '{word}' is not a dimension such as L or E_yz")
        else:
            dims.append((match["letter"], split_axes(match["axes"] or "")))
    if offences:
        raise InvalidInput(offences)
    return ShardedShape(tuple(dims), unreduced)
