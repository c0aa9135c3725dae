"""Compiled against planned, entry by entry: what the compiler changed, what that costs, and which line of ours it comes from.

Both sides are counted by kind, axes, dtype and bytes. What agrees is dropped; what is left is explained from the most to the least
specific reason, and what no reason explains is listed as it stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from partinf.cost.ledger import Ledger
from partinf.proof.report import Collective, Difference, Work

_DTYPES = {"bf16": "bfloat16", "f32": "float32"}  # the ledger's names; int8 is called the same
# Copies that take less than this share of the step are left out.
_NOTICED = 0.005

Seconds = Callable[[str, tuple[str, ...], int], float]


class Key(NamedTuple):
    """What two collectives must share to be the same."""

    op: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.op}({''.join(self.axes)}) of {self.bytes:,} bytes {self.dtype}"


def planned_collectives(ledger: Ledger, order: Iterable[str]) -> Counter[Key]:
    """The collectives of a ledger, axes in mesh order."""
    place = {axis: index for index, axis in enumerate(order)}
    found: Counter[Key] = Counter()
    for entry in ledger.entries:
        if entry.op is not None:
            axes = tuple(sorted(entry.axes, key=lambda axis: place[axis]))
            found[Key(entry.op.value, axes, _DTYPES.get(entry.dtype, entry.dtype), entry.bytes)] += entry.count
    return found


def differences(planned: Counter[Key], compiled: Iterable[Collective], seconds: Seconds) -> tuple[Difference, ...]:
    """All differences between the collectives, the dearest first.

    Args:
        seconds: time of one collective, from its kind, axes and bytes.
    """
    compiled = tuple(compiled)
    sources = {_key(one): one.source_op for one in compiled}
    real: Counter[Key] = Counter()
    for one in compiled:
        real[_key(one)] += one.count
    missing, extra = planned - real, real - planned
    found = _rewritten(missing, extra, compiled, seconds)
    found += _widened(missing, extra, sources, seconds)
    found += _regrouped(missing, extra, sources, seconds)
    found += [_plain("eliminated", key, count, -seconds(*key[:2], key.bytes)) for key, count in missing.items()]
    found += [_plain("other collective", key, count, seconds(*key[:2], key.bytes), sources[key]) for key, count in extra.items()]
    found += _merged(compiled, seconds)
    return tuple(sorted(found, key=lambda d: -abs(d.seconds)))


def extra_copies(work: Iterable[Work], step_seconds: float) -> tuple[Difference, ...]:
    """Data that the compiled program moves within a device and the plan knows nothing of, where it takes time worth noticing."""
    found = [
        Difference("extra copy", f"{copy.what}, {copy.num_bytes / 1e6:.3g} MB each", copy.count, copy.count * copy.seconds, copy.source_op)
        for copy in work
        if copy.moves and copy.count * copy.seconds > _NOTICED * step_seconds
    ]
    return tuple(sorted(found, key=lambda d: -d.seconds))


def stored_padding(arguments: int, planned: int) -> tuple[Difference, ...]:
    """Weights and cache that lie in tiles larger than they are."""
    if abs(arguments - planned) < 0.001 * planned:
        return ()
    what = f"arguments take {arguments / 1e9:.3f} GB per device, weights and cache as planned {planned / 1e9:.3f} GB"
    return (Difference("padding", what, 1, 0.0),)


def _key(one: Collective) -> Key:
    return Key(one.op, one.axes, one.dtype, one.bytes)


def _rewritten(missing: Counter[Key], extra: Counter[Key], compiled: Iterable[Collective], seconds: Seconds) -> list[Difference]:
    """All-reduces that our program requested as reduce-scatters; they leave both sides."""
    found = []
    for one in compiled:
        key = _key(one)
        wanted = key._replace(op=one.requested)
        count = min(missing[wanted], extra[key], one.count)
        if one.requested != "reduce-scatter" or one.op != "all-reduce" or not count:
            continue
        missing[wanted] -= count
        extra[key] -= count
        cost = count * (seconds(key.op, key.axes, key.bytes) - seconds(wanted.op, key.axes, key.bytes))
        found.append(Difference("reduce-scatter turned all-reduce", f"{wanted}", count, cost, one.source_op))
    missing += Counter()
    extra += Counter()
    return found


def _widened(missing: Counter[Key], extra: Counter[Key], sources: dict[Key, str], seconds: Seconds) -> list[Difference]:
    """The same values over the same axes in float32 where bfloat16 was planned (XLA on CPU has no other collectives)."""
    found = []
    for op, axes in {key[:2] for key in missing} & {key[:2] for key in extra}:
        ours = {key: count for key, count in missing.items() if key[:3] == (op, axes, "bfloat16")}
        theirs = {key: count for key, count in extra.items() if key[:3] == (op, axes, "float32")}
        before, after = (sum(key.bytes * count for key, count in side.items()) for side in (ours, theirs))
        if not before or after != 2 * before:
            continue
        cost = sum(seconds(op, axes, key.bytes) * count for key, count in theirs.items())
        cost -= sum(seconds(op, axes, key.bytes) * count for key, count in ours.items())
        what = f"{op}({''.join(axes)}): {before:,} bytes of bfloat16 became {after:,} of float32"
        found.append(Difference("wider type", what, sum(theirs.values()), cost, sources[next(iter(theirs))]))
        for side, keys in ((missing, ours), (extra, theirs)):
            for key in keys:
                del side[key]
    return found


def _regrouped(missing: Counter[Key], extra: Counter[Key], sources: dict[Key, str], seconds: Seconds) -> list[Difference]:
    """The same kind over the same axes in other pieces: equal bytes are a merge or a split, more bytes are padding."""
    found = []
    for op, axes, dtype in {key[:3] for key in missing} & {key[:3] for key in extra}:
        ours = {key: count for key, count in missing.items() if key[:3] == (op, axes, dtype)}
        theirs = {key: count for key, count in extra.items() if key[:3] == (op, axes, dtype)}
        before, after = (sum(key.bytes * count for key, count in side.items()) for side in (ours, theirs))
        cost = sum(seconds(*key[:2], key.bytes) * count for key, count in theirs.items())
        cost -= sum(seconds(*key[:2], key.bytes) * count for key, count in ours.items())
        kind = "merged collectives" if after == before else "padding" if after > before else "other collective"
        counts = f"{sum(ours.values())} of together {before:,} bytes became {sum(theirs.values())} of {after:,} bytes"
        found.append(Difference(kind, f"{op}({''.join(axes)}) {dtype}: {counts}", sum(theirs.values()), cost, sources[next(iter(theirs))]))
        for side, keys in ((missing, ours), (extra, theirs)):
            for key in keys:
                del side[key]
    return found


def _merged(compiled: Iterable[Collective], seconds: Seconds) -> list[Difference]:
    """Several collectives in one op: the bytes are the same, hops are saved."""
    found = []
    together: dict[tuple[str, tuple[str, ...], int, int], list[Collective]] = {}
    for one in compiled:
        if one.merged > 1:
            together.setdefault((one.op, one.axes, one.merged, one.count if one.bytes else 0), []).append(one)
    for (op, axes, merged, _), parts in together.items():
        ops = min(part.count for part in parts)
        alone = sum(seconds(op, axes, part.bytes) * part.count for part in parts)
        gain = sum(part.seconds * part.count for part in parts) - alone
        sizes = " + ".join(f"{part.bytes:,}" for part in parts)
        what = f"{merged} × {op}({''.join(axes)}) in one op: {sizes} bytes"
        found.append(Difference("merged collectives", what, ops, gain, parts[0].source_op))
    return found


def _plain(kind: str, key: Key, count: int, cost: float, source: str = "") -> Difference:
    return Difference(kind, str(key), count, cost * count, source)
