"""What of a step is hidden: collectives unrolled into the adjacent products, and gathers of weights during the layer before.

A looped collective matmul cuts a product into as many partial ones as its axis has devices and moves one part while the next is
multiplied (Wang et al., 2023; Pope et al., 2023, section 3.5). It goes around one axis, so a product can overlap one collective over one
axis: the most expensive. The first (or last) partial product overlaps nothing, and the steps of the ring are not hidden.

Where layers are compiled one by one, core and HBM are two queues: what a product waits for HBM passes while others (collectives, the core's
own work) leave HBM alone. All together take what the longer queue takes: with c and m of every entry,
Σ max(c, m) - min(Σ max(m - c, 0), Σ max(c - m, 0)) = max(Σ c, Σ m), as long as what is read early finds room on the chip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from partinf.cost.ledger import Entry, EntryKind, Ledger, Op, Part
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


def behind(entries: list[Entry], seconds: Callable[[], float], pricing: Pricing, ops: Sequence[Op] = (Op.ALL_TO_ALL,)) -> list[Entry]:
    """Exchanges of one layer that run behind work which does not wait for them, where the program's compiler starts them early.

    Args:
        seconds: what that work takes in a layer. ops: the collectives that it starts early enough.
    """
    program, platform = pricing.program, pricing.slice.chip.platform
    if not (program.exchanges_overlap and platform.gathers_overlap_products and any(one.op in ops for one in entries)):
        return entries
    left, found = seconds(), []
    for entry in entries:
        hidden = min(entry.seconds, left) if entry.op in ops else 0.0
        left -= hidden
        found.append(entry._replace(overlapped=hidden) if hidden else entry)
    return found


def hide_gathers(entries: Iterable[Entry]) -> Ledger:
    """A ledger in which gathers of weights run behind the layers' compute, no more of them than loops leave of it, and waits for HBM
    behind what leaves HBM alone."""
    kept = tuple(entries)
    ahead = sum(entry.ahead * entry.count for entry in kept)
    early, free = fetches(kept)
    if ahead == 0 and early == 0:
        return Ledger(kept)
    share = min(1.0, max(0.0, compute_left(kept)) / ahead) if ahead else 0.0
    fetched = min(1.0, free / early) if early else 0.0
    return Ledger(
        tuple(e._replace(overlapped=e.overlapped + e.ahead * share + e.early * fetched) if e.ahead or e.early else e for e in kept)
    )


def bound_fetches(entries: list[Entry], pricing: Pricing) -> list[Entry]:
    """The entries of one layer, with no more of their waits for HBM early than the program has room for what is read."""
    early = sum(entry.early for entry in entries)
    if early <= pricing.fetch_seconds:
        return entries
    share = pricing.fetch_seconds / early
    return [entry._replace(early=entry.early * share) if entry.early else entry for entry in entries]


def fetches(entries: Iterable[Entry]) -> tuple[float, float]:
    """Seconds that wait for HBM alone, and seconds that leave it alone and that nothing else is to hide."""
    early = free = 0.0
    for entry in entries:
        early += entry.early * entry.count
        free += (entry.free - min(entry.free, entry.ahead + entry.overlapped)) * entry.count
    return early, free


def compute_left(entries: Iterable[Entry]) -> float:
    """Seconds of the layers' products behind which nothing runs yet."""
    left = 0.0
    for entry in entries:
        if entry.kind in (EntryKind.MATMUL, EntryKind.ATTENTION):
            if entry.part in _LAYERS:
                left += entry.seconds * entry.count
        elif entry.overlapped:
            left -= entry.overlapped * entry.count
    return left
