"""Every way to assign roles to the axes of a slice, equal axes once.

Axes are equal when swapping them changes no cost: same size, same kind of links, same wraparound. A factor of a torus axis is equal to no
other axis. Between slices weights are copied, or layers are split; that tensors are split there is priced too, to say what it would cost,
but nothing is gathered through that network. Storage is enumerated first; the options of a phase (gathered axes and attention roles) follow
for each storage, so that both phases share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from partinf.hardware import Link, MeshAxis, Slice
from partinf.layout import AttentionRole, Layout, Phase, Role

Storage = tuple[Role, ...]
Gather = tuple[bool, ...]
AxisClass = tuple[object, ...]

_STORED = (Role.EMBED, Role.FFN, Role.REPLICA, Role.STAGE)
_BETWEEN_SLICES = (Role.REPLICA, Role.STAGE, Role.FFN)
_ATTENDED = (AttentionRole.HEADS, AttentionRole.BATCH, AttentionRole.SEQUENCE, AttentionRole.NONE)


class PhaseOption(NamedTuple):
    """Gathered axes and attention roles of one phase, aligned with the slice's axes.

    Attributes:
        heads: marks the axes that split heads. number: equal for equal attention roles, a short key for them.
    """

    gather: tuple[bool, ...]
    attention: tuple[AttentionRole, ...]
    heads: tuple[bool, ...]
    number: int


@dataclass(frozen=True)
class AxisTable:
    """The axes of a slice as the enumeration sees them.

    Attributes:
        names, sizes: in mesh order. class_ids: equal numbers for equal axes. storage: roles that each may have in storage.
        gathered: whether weights may be gathered over an axis. phases: those that were asked for.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    class_ids: tuple[int, ...]
    storage: tuple[tuple[Role, ...], ...]
    gathered: tuple[bool, ...]
    phases: dict[PhaseOption, Phase] = field(default_factory=dict, compare=False, repr=False)

    def phase(self, option: PhaseOption) -> Phase:
        found = self.phases.get(option)
        if found is None:
            gather = tuple(name for name, used in zip(self.names, option.gather, strict=True) if used)
            found = self.phases[option] = Phase(gather, tuple(zip(self.names, option.attention, strict=True)))
        return found

    def layout(self, storage: Storage, prefill: PhaseOption, decode: PhaseOption) -> Layout:
        return Layout(tuple(zip(self.names, storage, strict=True)), self.phase(prefill), self.phase(decode), check=False)


def axis_table(slice_: Slice) -> AxisTable:
    """What the enumeration needs to know of a slice."""
    axes = slice_.axes
    storage = tuple((Role.REPLICA,) if axis.size == 1 else _BETWEEN_SLICES if axis.link is Link.DCN else _STORED for axis in axes)
    gathered = tuple(axis.size > 1 and axis.link is not Link.DCN for axis in axes)
    classes = tuple(_axis_class(axis, slice_) for axis in axes)
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(classes))}
    return AxisTable(tuple(a.name for a in axes), tuple(a.size for a in axes), tuple(numbers[c] for c in classes), storage, gathered)


def storages(table: AxisTable, num_kv_heads: int) -> list[Storage]:
    """Storage roles of all axes, one representative of those that differ only by swapping equal axes.

    Key-value heads are dealt over FFN axes first, then over others in mesh order, as far as they divide. With several of them the order
    of the axes within either kind is therefore kept; with one there is nothing to deal.
    """
    seen: dict[object, Storage] = {}
    for storage in itertools.product(*table.storage):
        marked = list(zip(table.class_ids, storage, strict=True))
        stored = [pair for pair in marked if pair[1] is Role.FFN]
        others = [pair for pair in marked if pair[1] is not Role.FFN]
        signature = (sorted(stored), sorted(others)) if num_kv_heads == 1 else (stored, others)
        seen.setdefault(repr(signature), storage)
    return list(seen.values())


def gathers(table: AxisTable, storage: Storage) -> list[Gather]:
    """Every set of axes that a storage can gather."""
    stored = [role in (Role.EMBED, Role.FFN) and may for role, may in zip(storage, table.gathered, strict=True)]
    return list(itertools.product(*((False, True) if stores else (False,) for stores in stored)))


def attentions_of(table: AxisTable, storage: Storage) -> int:
    """Number of attention roles for a storage, equal axes counted apart."""
    free = [size > 1 and role is not Role.STAGE for size, role in zip(table.sizes, storage, strict=True)]
    return int(len(_ATTENDED) ** sum(free))


def num_options(table: AxisTable, storage: Storage) -> int:
    """Options of a phase for a storage, equal axes counted apart."""
    return len(gathers(table, storage)) * attentions_of(table, storage)


def phase_options(table: AxisTable, storage: Storage, allowed: Collection[Gather]) -> Iterator[PhaseOption]:
    """Every choice of these gathered axes and attention roles for a storage, equal axes not yet merged."""
    attended = [(AttentionRole.NONE,) if size == 1 else _ATTENDED for size in table.sizes]
    stages = [index for index, role in enumerate(storage) if role is Role.STAGE]  # they split nothing within a layer
    roles = [
        (a, tuple(role is AttentionRole.HEADS for role in a), number)
        for number, a in enumerate(itertools.product(*attended))
        if all(a[index] is AttentionRole.NONE for index in stages)
    ]
    for gather in gathers(table, storage):
        if gather not in allowed:
            continue
        for attention, heads, number in roles:
            yield PhaseOption(gather, attention, heads, number)


class HeadSplits:
    """How query and key-value heads are split by storage and attention roles: `layout.head_axes` and `kv_head_axes` without a layout."""

    def __init__(self, table: AxisTable, num_kv_heads: int) -> None:
        self._table, self._num_kv_heads = table, num_kv_heads
        self._known: dict[tuple[Storage, tuple[bool, ...]], tuple[int, tuple[bool, ...]]] = {}

    def of(self, storage: Storage, *options: PhaseOption) -> tuple[int, tuple[bool, ...]]:
        """Parts into which query heads are split in these phases, and which axes split key-value heads too."""
        asked = options[0].heads if len(options) == 1 else tuple(map(any, zip(*(o.heads for o in options), strict=True)))
        key = (storage, asked)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._work_out(storage, asked)
        return found

    def _work_out(self, storage: Storage, asked: tuple[bool, ...]) -> tuple[int, tuple[bool, ...]]:
        stored = [i for i, role in enumerate(storage) if role is Role.FFN]
        added = [i for i, role in enumerate(storage) if role is not Role.FFN and asked[i]]
        parts, kv, dividing = 1, [False] * len(storage), True
        for i in stored + added:
            parts *= self._table.sizes[i]
            dividing = dividing and self._num_kv_heads % parts == 0
            kv[i] = dividing
        return parts, tuple(kv)


def option_signature(table: AxisTable, storage: Storage, option: PhaseOption, kv: tuple[bool, ...]) -> object:
    """Equal for options that differ only by swapping equal axes.

    Args:
        kv: which axes split key-value heads; heads are dealt over leading axes as far as they divide, so order breaks that tie.
    """
    return _signature(table, list(zip(storage, option.gather, option.attention, kv, strict=True)))


def _signature(table: AxisTable, marks: list[tuple[object, ...]]) -> object:
    return tuple(sorted(zip(table.class_ids, marks, strict=True)))


def _axis_class(axis: MeshAxis, slice_: Slice) -> AxisClass:
    if axis.link is Link.TORUS and axis.size != axis.torus_size:
        return (axis.name,)
    if axis.link is Link.SWITCH:
        return (axis.link.value, axis.size, min(axis.size, max(1, slice_.chip.node_size // axis.stride)))
    return (axis.link.value, axis.size, axis.wraps)
