"""What of a step is hidden: collectives unrolled into the products beside them, and gathers of weights behind the layer before.

A looped collective matmul cuts a product into as many partial ones as its axis has devices and moves one part while the next is
multiplied (Wang et al., 2023; Pope et al., 2023, section 3.5). It goes around one axis, so beside every product one collective over one
axis can run: the dearest. The first (or last) partial product has nothing beside it, and the steps of the ring are not hidden.
"""

from __future__ import annotations

from collections.abc import Iterable

from partinf.cost.ledger import Entry, Kind, Ledger, Part
from partinf.cost.pricing import Pricing

_LAYERS = (Part.ATTENTION, Part.FFN)


def run_loops(entries: list[Entry], pricing: Pricing, parallel: bool) -> list[Entry]:
    """The entries of linear layers, with what a looped program hides behind its products marked as overlapped.

    Args:
        parallel: both sublayers share their products, so there is one loop on either side, not one for each sublayer.
    """
    found = list(entries)
    sides: dict[tuple[str, str], list[int]] = {}
    for index, entry in enumerate(entries):
        side = entry.item.side  # before the activation or the core, or after it
        if side is not None:
            sides.setdefault((side, "" if parallel else entry.part.value), []).append(index)
    for members in sides.values():
        products = sum(entries[i].seconds for i in members if entries[i].op is None)
        rings: dict[tuple[str, ...], list[int]] = {}
        for i in members:
            if entries[i].op is not None and len(entries[i].axes) == 1:
                rings.setdefault(entries[i].axes, []).append(i)
        hidden = {axes: _hidden(entries, ring, products, pricing) for axes, ring in rings.items()}
        if not hidden:
            continue
        axes = max(hidden, key=lambda ring: hidden[ring][0])
        share = hidden[axes][1]
        for i in rings[axes]:
            found[i] = entries[i]._replace(overlapped=_moving(entries[i], pricing) * share)
    return found


def _hidden(entries: list[Entry], ring: list[int], products: float, pricing: Pricing) -> tuple[float, float]:
    """Seconds that a loop over this ring hides, and the share of its movement that they are."""
    moving = sum(_moving(entries[i], pricing) for i in ring)
    size = pricing.slice.axis_sizes[entries[ring[0]].axes[0]]
    seconds = min(moving, products * (size - 1) / size)
    return seconds, seconds / moving if moving else 0.0


def _moving(entry: Entry, pricing: Pricing) -> float:
    """What a collective takes for its bytes, beyond an empty one."""
    assert entry.op is not None
    empty = pricing.network.seconds(entry.op, entry.axes, 0)
    return max(0.0, min(entry.seconds, pricing.network.seconds(entry.op, entry.axes, entry.bytes) - empty))


def hide_gathers(entries: Iterable[Entry]) -> Ledger:
    """A ledger in which gathers of weights run behind the layers' compute: no more of them than loops leave of it."""
    kept = tuple(entries)
    ahead = sum(entry.ahead * entry.count for entry in kept)
    if ahead == 0:
        return Ledger(kept)
    share = min(1.0, max(0.0, compute_left(kept)) / ahead)
    return Ledger(tuple(e._replace(overlapped=e.ahead * share) if e.ahead else e for e in kept))


def compute_left(entries: Iterable[Entry]) -> float:
    """Seconds of the layers' products behind which nothing runs yet."""
    left = 0.0
    for entry in entries:
        if entry.kind in (Kind.MATMUL, Kind.ATTENTION):
            if entry.part in _LAYERS:
                left += entry.seconds * entry.count
        elif entry.overlapped:
            left -= entry.overlapped * entry.count
    return left
