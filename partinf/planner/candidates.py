"""Every way to assign roles to the axes of a slice, equal axes once.

Axes are equal when swapping them changes no cost: same size, same kind of links, same wraparound. A factor of a torus axis is equal to no
other axis. Between slices weights are copied, or layers are split; that tensors are split there is priced too, to say what it would cost,
but nothing is gathered through that network. Storage is enumerated first; the options of a phase (gathered axes and attention roles) follow
for each storage, so that both phases share it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from partinf.hardware.slices import Link, MeshAxis, Slice
from partinf.layout import AttentionRole, Dispatch, ExpertRole, Layout, Phase, Role

Storage = tuple[Role, ...]
ExpertRoles = tuple[ExpertRole, ...]
AxisClass = tuple[object, ...]

SPLITTING = (ExpertRole.EXPERT, ExpertRole.FFN, ExpertRole.EMBED)
_OF_EXPERTS = (*SPLITTING, ExpertRole.REPLICA)
_STORED = (Role.EMBED, Role.FFN, Role.REPLICA, Role.STAGE)
_BETWEEN_SLICES = (Role.REPLICA, Role.STAGE, Role.FFN)
_ATTENDED = (AttentionRole.HEADS, AttentionRole.BATCH, AttentionRole.SEQUENCE, AttentionRole.NONE)


class Stored(NamedTuple):
    """Roles of all axes in storage: for dense weights, and for experts' matrices, empty where the model has none."""

    roles: Storage
    experts: ExpertRoles = ()


class Gather(NamedTuple):
    """The axes over which a phase gathers weights, and those over which it gathers experts' matrices, aligned with the slice's axes; and
    whether it exchanges rows between experts."""

    dense: tuple[bool, ...]
    experts: tuple[bool, ...] = ()
    exchanged: bool = False


class Attention(NamedTuple):
    """Attention roles of one phase, aligned with the slice's axes.

    Attributes:
        number: equal for equal roles, a short key for them. heads: one bit for each axis that splits heads, the first axis lowest.
        batch_ways, sequence_ways: into how many parts whole requests, and the keys of each request, are split.
    """

    roles: tuple[AttentionRole, ...]
    number: int
    heads: int
    batch_ways: int
    sequence_ways: int


class PhaseOption(NamedTuple):
    """Gathered axes and attention roles of one phase, aligned with the slice's axes."""

    gather: Gather
    attention: Attention


@dataclass(frozen=True)
class AxisTable:
    """The axes of a slice as the enumeration sees them.

    Attributes:
        names, sizes: in mesh order. class_ids: equal numbers for equal axes. storage: roles that each may have in storage.
        gathered: whether weights may be gathered over an axis. attentions: every choice of attention roles, stages apart.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    class_ids: tuple[int, ...]
    storage: tuple[tuple[Role, ...], ...]
    gathered: tuple[bool, ...]
    attentions: tuple[Attention, ...]
    _phases: dict[tuple[Gather, int, bool], Phase] = field(default_factory=dict, compare=False, repr=False)
    _named: dict[Stored, tuple[tuple[tuple[str, Role], ...], tuple[tuple[str, ExpertRole], ...]]] = field(
        default_factory=dict, compare=False, repr=False
    )
    _free: dict[tuple[int, ...], list[Attention]] = field(default_factory=dict, compare=False, repr=False)

    def phase(self, option: PhaseOption, whole: bool = False) -> Phase:
        """An option as a phase, with what passes between sublayers whole or split."""
        key = (option.gather, option.attention.number, whole)
        found = self._phases.get(key)
        if found is None:
            gather, attention = option.gather, tuple(zip(self.names, option.attention.roles, strict=True))
            dense, experts = (self.named(marked) for marked in (gather.dense, gather.experts))
            dispatch = Dispatch.EXCHANGE if gather.exchanged else Dispatch.GATHER
            found = self._phases[key] = Phase(dense, attention, whole=whole, gather_experts=experts, dispatch=dispatch)
        return found

    def named(self, marked: tuple[bool, ...]) -> tuple[str, ...]:
        """The names of the axes that are marked."""
        return tuple(name for name, used in zip(self.names, marked, strict=False) if used)

    def layout(self, stored: Stored, prefill: PhaseOption, decode: PhaseOption, whole: tuple[bool, bool] = (False, False)) -> Layout:
        """The layout of two options.

        Args:
            whole: whether what passes between sublayers is whole in prefill, and in decode.
        """
        known = self._named.get(stored)
        if known is None:
            named = tuple(zip(self.names, stored.roles, strict=True)), tuple(zip(self.names, stored.experts, strict=False))
            known = self._named[stored] = named
        roles, experts = known
        return Layout(roles, self.phase(prefill, whole[0]), self.phase(decode, whole[1]), check=False, experts=experts)

    def attentions_of(self, storage: Storage) -> list[Attention]:
        """Every choice of attention roles for a storage, equal axes not yet merged; stages split nothing within a layer."""
        stages = tuple(index for index, role in enumerate(storage) if role is Role.STAGE)
        found = self._free.get(stages)
        if found is None:
            left = (a for a in self.attentions if all(a.roles[index] is AttentionRole.NONE for index in stages))
            found = self._free[stages] = list(left)
        return found


def axis_table(slice_: Slice) -> AxisTable:
    """What the enumeration needs to know of a slice."""
    axes = slice_.axes
    storage = tuple((Role.REPLICA,) if axis.size == 1 else _BETWEEN_SLICES if axis.link is Link.DCN else _STORED for axis in axes)
    gathered = tuple(axis.size > 1 and axis.link is not Link.DCN for axis in axes)
    classes = tuple(_axis_class(axis, slice_) for axis in axes)
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(classes))}
    names, sizes = tuple(axis.name for axis in axes), tuple(axis.size for axis in axes)
    return AxisTable(names, sizes, tuple(numbers[c] for c in classes), storage, gathered, _attentions(sizes))


def _attentions(sizes: tuple[int, ...]) -> tuple[Attention, ...]:
    found = []
    for number, roles in enumerate(itertools.product(*((AttentionRole.NONE,) if size == 1 else _ATTENDED for size in sizes))):
        batch_ways, sequence_ways = (
            math.prod(size for size, has in zip(sizes, roles, strict=True) if has is role)
            for role in (AttentionRole.BATCH, AttentionRole.SEQUENCE)
        )
        heads = sum(1 << index for index, role in enumerate(roles) if role is AttentionRole.HEADS)
        found.append(Attention(roles, number, heads, batch_ways, sequence_ways))
    return tuple(found)


def storages(table: AxisTable, num_kv_heads: int) -> list[Storage]:
    """Storage roles of all axes, one representative of those that differ only by swapping equal axes.

    Key-value heads are split over FFN axes first, then over others in mesh order, as far as they divide. With several of them the order
    of the axes within either kind is therefore kept; with one there is nothing to split.
    """
    seen: dict[object, Storage] = {}
    for storage in itertools.product(*table.storage):
        marked = list(zip(table.class_ids, storage, strict=True))
        stored = [pair for pair in marked if pair[1] is Role.FFN]
        others = [pair for pair in marked if pair[1] is not Role.FFN]
        signature = (sorted(stored), sorted(others)) if num_kv_heads == 1 else (stored, others)
        seen.setdefault(repr(signature), storage)
    return list(seen.values())


def gathers(table: AxisTable, stored: Stored) -> list[Gather]:
    """Every set of axes over which a storage can gather weights, with every choice of `expert_gathers` in addition."""
    splits = [role in (Role.EMBED, Role.FFN) and may for role, may in zip(stored.roles, table.gathered, strict=True)]
    dense = itertools.product(*((False, True) if one else (False,) for one in splits))
    return [gather for one in dense for gather in expert_gathers(table, stored, one)]


def expert_gathers(table: AxisTable, stored: Stored, dense: tuple[bool, ...]) -> list[Gather]:
    """The choices with one set of axes over which dense weights are gathered: experts' matrices over axes that split tokens and them,
    where nothing is sent then. Rows can be exchanged along the others that split tokens and experts."""
    if not stored.experts:
        return [Gather(dense)]
    found, names = [], range(len(table.names))
    tokens = [role is Role.REPLICA or used for role, used in zip(stored.roles, dense, strict=True)]
    may = [tokens[i] and table.gathered[i] and stored.experts[i] in SPLITTING for i in names]
    for experts in itertools.product(*((False, True) if each else (False,) for each in may)):
        found.append(Gather(dense, experts))
        if any(tokens[i] and stored.experts[i] is ExpertRole.EXPERT and not experts[i] for i in names):
            found.append(Gather(dense, experts, exchanged=True))
    return found


def num_options(table: AxisTable, storage: Storage, experts: bool) -> int:
    """Options of a phase for a storage, equal axes counted apart.

    Args:
        experts: the model has such; every axis that splits weights or tokens has four roles for them.
    """
    roles = math.prod(len(_OF_EXPERTS) for role, size in zip(storage, table.sizes, strict=True) if size > 1 and role is not Role.STAGE)
    return len(gathers(table, Stored(storage))) * len(table.attentions_of(storage)) * (roles if experts else 1)


def expert_roles(table: AxisTable, storage: Storage) -> list[ExpertRoles]:
    """Every choice of roles for experts' matrices for a storage. Of those that differ only by swapping equal axes that copy the dense
    weights there is one; others may be gathered each, and have their place among the axes of heads. Stages are both, and between slices
    there is nothing but copies or experts."""
    may: list[tuple[ExpertRole, ...]] = []
    for role, size, gathered in zip(storage, table.sizes, table.gathered, strict=True):
        if role is Role.STAGE:
            may.append((ExpertRole.STAGE,))
        elif size == 1:
            may.append((ExpertRole.REPLICA,))
        else:
            may.append(_OF_EXPERTS if gathered else (ExpertRole.REPLICA, ExpertRole.EXPERT))
    seen: dict[object, ExpertRoles] = {}
    for roles in itertools.product(*may):
        marked = list(zip(table.class_ids, storage, roles, strict=True))
        others = [(kind, role) for kind, dense, role in marked if dense is not Role.REPLICA]
        seen.setdefault((tuple(sorted((kind, role) for kind, dense, role in marked if dense is Role.REPLICA)), tuple(others)), roles)
    return list(seen.values())


class HeadSplits:
    """How query and key-value heads are split by storage and attention roles: `layout.head_axes` and `kv_head_axes` without a layout."""

    def __init__(self, table: AxisTable, num_kv_heads: int) -> None:
        self._table, self._num_kv_heads = table, num_kv_heads
        self._known: dict[tuple[Storage, int], tuple[int, tuple[bool, ...]]] = {}

    def of(self, storage: Storage, heads: int) -> tuple[int, tuple[bool, ...]]:
        """Parts into which query heads are split when attention splits them over these axes, and which axes split key-value heads too.

        Args:
            heads: as in `Attention`; of two phases, the bits of both.
        """
        key = (storage, heads)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._work_out(storage, heads)
        return found

    def _work_out(self, storage: Storage, heads: int) -> tuple[int, tuple[bool, ...]]:
        stored = [i for i, role in enumerate(storage) if role is Role.FFN]
        added = [i for i, role in enumerate(storage) if role is not Role.FFN and heads >> i & 1]
        parts, kv, dividing = 1, [False] * len(storage), True
        for i in stored + added:
            parts *= self._table.sizes[i]
            dividing = dividing and self._num_kv_heads % parts == 0
            kv[i] = dividing
        return parts, tuple(kv)


def option_signature(table: AxisTable, stored: Stored, option: PhaseOption, kv: tuple[bool, ...]) -> object:
    """Equal for options of a storage that differ only by swapping equal axes.

    Args:
        kv: which axes split key-value heads; heads are split over leading axes as far as they divide, so order breaks that tie.
    """
    gather, alike = option.gather, tuple(zip(table.class_ids, stored.roles, option.gather.dense, option.attention.roles, kv, strict=True))
    if not stored.experts:
        return tuple(sorted(alike))
    return gather.exchanged, tuple(sorted(zip(alike, stored.experts, gather.experts, strict=True)))


def _axis_class(axis: MeshAxis, slice_: Slice) -> AxisClass:
    if axis.link is Link.TORUS and axis.size != axis.torus_size:
        return (axis.name,)
    if axis.link is Link.SWITCH:
        return (axis.link.value, axis.size, min(axis.size, max(1, slice_.chip.node_size // axis.stride)))
    return (axis.link.value, axis.size, axis.wraps)
