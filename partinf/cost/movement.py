"""Which collectives bring a tensor from one split to another, with their payloads.

Per mesh axis a tensor is in one of four states: its rows (tokens) are split, its columns (heads) are split, it is still to be summed,
or it is whole. There is one way from each state to each, and the ways are taken in an order that shrinks the payload first:

    whole     -> rows/columns    slice, free
    unreduced -> rows/columns    reduce-scatter, axis by axis
    unreduced -> whole           one all-reduce over all such axes
    columns   -> rows            one all-to-all over all such axes; then rows -> columns likewise
    rows/columns -> whole        one all-gather over all such axes for each dimension, that over fewer axes first

A looped program goes around one ring at a time, so its gathers too go axis by axis. The longest axis has the largest payload: first in a
reduce-scatter, last in a gather.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from partinf.cost.ledger import Op

Axes = tuple[str, ...]


class Split(NamedTuple):
    """The axes that split rows and columns, and those over which the tensor is still to be summed."""

    rows: Axes = ()
    cols: Axes = ()
    unreduced: Axes = ()


class Group(NamedTuple):
    """One token group in the attention core.

    Attributes:
        batch: axes that split whole requests. heads: axes that split query heads. kv: those that split kv heads too.
        sequence: axes that split the keys of each request.
    """

    batch: Axes
    heads: Axes
    kv: Axes
    sequence: Axes


class Moved(NamedTuple):
    """One collective of a movement: its op, axes, and payload in elements (output of an all-gather, input of the others)."""

    op: Op
    axes: Axes
    elements: int


def ways(axes: Axes, sizes: Mapping[str, int]) -> int:
    """Product of the sizes of these axes."""
    total = 1
    for axis in axes:
        total *= sizes[axis]
    return total


def moves(elements: int, source: Split, target: Split, sizes: Mapping[str, int], stepwise: bool, order: Axes) -> list[Moved]:
    """The collectives that bring a tensor of `elements` (over all devices) from `source` to `target`, in order.

    Args:
        target: reduced over every axis.
        stepwise: gathers go axis by axis, as reduce-scatters always do.
        order: of reduce-scatters (`Slice.scatter_order`).
    """
    if source == target:
        return []
    rows, cols, have = target.rows, target.cols, source.rows + source.cols
    local = elements // ways(have, sizes)
    found = []
    held = have + source.unreduced
    for axis in rows + cols:
        if axis not in held:
            local //= sizes[axis]
    scattered = tuple(axis for axis in source.unreduced if axis in rows or axis in cols)
    for axis in sorted(scattered, key=lambda a: -sizes[a]) if stepwise else sorted(scattered, key=order.index):
        found.append(Moved(Op.REDUCE_SCATTER, (axis,), local))
        local //= sizes[axis]
    summed = tuple(axis for axis in source.unreduced if axis not in scattered)
    if summed:
        found.append(Moved(Op.ALL_REDUCE, summed, local))
    for exchanged in (tuple(a for a in rows if a in source.cols), tuple(a for a in cols if a in source.rows)):
        if exchanged:
            found.append(Moved(Op.ALL_TO_ALL, exchanged, local))
    ends = [tuple(a for a in dim if a not in rows and a not in cols) for dim in (source.rows, source.cols)]
    ends.sort(key=len)  # the last one moves most, so it gets the links of most axes
    if stepwise:
        ends = [(axis,) for axis in sorted(ends[0] + ends[1], key=lambda a: sizes[a])]
    for gone in ends:
        if gone:
            local *= ways(gone, sizes)
            found.append(Moved(Op.ALL_GATHER, gone, local))
    return found
