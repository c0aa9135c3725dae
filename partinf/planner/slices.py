"""Slices of a kind of chip that can be rented, with sides that are powers of two: those are what models' dimensions divide."""

from __future__ import annotations

import math

from partinf.foundation.errors import nearest, raise_offences
from partinf.hardware.chips import Chip, chips
from partinf.hardware.slices import Slice, make_slice

MOST_CHIPS = 512


def one_chip(name: str, measured: Chip | None = None) -> Slice:
    """A slice of one chip, for a search over slices of that kind.

    Args:
        measured: the chip of a hardware file, which stands for the table's chip of its name.

    Raises:
        InvalidInput: an unknown chip (nearest one), or a measured one whose figures hold for one number of devices alone.
    """
    known = {**chips(), measured.name: measured} if measured is not None else chips()
    offences = []
    if name not in known:
        offences.append(f"slice auto:{name}: expected auto:CHIP{nearest(name, known)}")
    if measured is not None and measured.platform.virtual:
        offences.append(f"slice auto:{name}: a hardware file of a CPU holds for its number of devices alone, and auto tries many")
    raise_offences(offences)
    return make_slice(known[name], (1,) * (known[name].torus_dims or 1))


def shapes_of(chip: Chip, num_chips: int) -> list[Slice]:
    """All shapes of so many chips that can be rented, sides powers of two."""
    exact = (shape for shape in chip.rented_shapes(num_chips) if math.prod(shape) == num_chips)
    return [make_slice(chip, shape) for shape in exact if all(side & (side - 1) == 0 for side in shape)]


def slices_of(chip: Chip, most_chips: int = MOST_CHIPS) -> list[Slice]:
    """The most cubic shape of every number of chips that can be rented, fewest first, sides powers of two."""
    found: dict[int, tuple[int, ...]] = {}
    for shape in chip.rented_shapes(most_chips):
        if all(side & (side - 1) == 0 for side in shape):
            found.setdefault(math.prod(shape), shape)
    return [make_slice(chip, shape) for shape in found.values()]
