"""Which roles for experts' matrices are worth looking at beside some roles for dense weights.

What experts take is added to a step whatever attention does, and depends on the dense roles only through the axes that split tokens
and what passes between sublayers. Of the roles for experts beside one storage therefore only those remain that no others beat: these would
be no slower over all steps of all phases, whatever axes each phase gathers dense weights over, with experts' matrices gathered as is best
and not at all; no larger, in the matrices and in a layer's working set; and would spread rows over no further axes, which pad a small
batch. Whatever else is chosen, what was left out would have been slower or larger with the same choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from partinf.layout import ExpertRole, Role
from partinf.model.config import ModelConfig
from partinf.planner.candidates import SPLITTING, ExpertRoles, Gather, PhaseOption, Storage, Stored, expert_roles, gathers
from partinf.planner.options import Space

NO_FASTER = "roles for experts that are no faster than others beside the same dense weights"
_NEGLIGIBLE = 0.01  # of the memory that a program may use: working sets below it are as good as none


class _Does(IntEnum):
    """What an axis does in a phase: splits tokens, d_ff or d_model of what passes between sublayers, or layers."""

    TOKENS = 0
    FFN = 1
    EMBED = 2
    STAGES = 3


_DOES = {(role, True): _Does.TOKENS for role in Role} | {
    (Role.REPLICA, False): _Does.TOKENS,
    (Role.FFN, False): _Does.FFN,
    (Role.EMBED, False): _Does.EMBED,
    (Role.STAGE, False): _Does.STAGES,
}


class Worth(NamedTuple):
    """Roles for experts that are worth looking at, and what they take at least in a step of each phase."""

    experts: ExpertRoles
    seconds: tuple[float, ...]


class _Figures(NamedTuple):
    """What counts, less being better.

    Attributes:
        best, stays: for every phase, and every set of gathered axes in it, seconds of all its steps, with experts' matrices gathered as is
            best, and not gathered. sizes: the working sets of these. apart: the least seconds without those behind which others may read.
        rows: the axes that copy experts. share: of all experts' matrices, what one device has.
    """

    best: tuple[tuple[float, ...], ...]
    stays: tuple[tuple[float, ...], ...]
    apart: tuple[tuple[float, ...], ...]
    sizes: tuple[float, ...]
    rows: frozenset[str]
    share: float

    def beats(self, other: _Figures) -> bool:
        """Whether it is no slower over all phases together, whatever is gathered in each, and in nothing larger."""
        if not (self.rows <= other.rows and self.share <= other.share):
            return False
        if any(mine > others for mine, others in zip(self.sizes, other.sizes, strict=True)):
            return False
        pairs = (self.best, other.best), (self.stays, other.stays), (self.apart, other.apart)
        return all(_most_slower(mine, others) <= 0.0 for mine, others in pairs)


def _most_slower(mine: tuple[tuple[float, ...], ...], others: tuple[tuple[float, ...], ...]) -> float:
    """By how much one is slower than another at most, over the sets of gathered axes of each phase."""
    phases = zip(mine, others, strict=True)
    return sum(max(one - other for one, other in zip(*phase, strict=True)) for phase in phases)


class ExpertStorage:
    """The roles for experts over one slice."""

    def __init__(self, space: Space, labels: Sequence[str], times: Sequence[int]) -> None:
        """
        Args:
            times: as many steps of each phase are asked for.
        """
        self._space, self._labels, self._times = space, labels, times
        self._splits: dict[ExpertRoles, str] = {}
        self._known: dict[object, tuple[float, int, float]] = {}
        self._known_gathers: dict[Stored, list[Gather]] = {}

    def beside(self, storage: Storage) -> list[Worth]:
        """Those worth looking at beside a storage, the fastest in all phases together first; all where nothing is passed over."""
        space = self._space
        floors = tuple(space.floor(storage, label) for label in self._labels)
        if space.model.experts is None:
            return [Worth((), floors)]
        every = [roles for roles in expert_roles(space.table, storage) if self._holds(roles)]
        if space.cut is None:
            return [Worth(roles, floors) for roles in every]
        figured = [one for roles in every for one in self._figured(storage, roles)]
        kept: list[tuple[_Figures, Worth]] = []
        for figures, worth in sorted(figured, key=lambda one: self._together(one[1].seconds)):
            if not any(other.beats(figures) for other, _ in kept):
                kept.append((figures, worth))
        space.refused[NO_FASTER] += len(every) - len(kept)
        return [worth for _, worth in kept]

    def _together(self, seconds: Iterable[float]) -> float:
        return sum(n * one for n, one in zip(self._times, seconds, strict=True))

    def _figured(self, storage: Storage, roles: ExpertRoles) -> list[tuple[_Figures, Worth]]:
        """One, with what a step of each phase takes at least; none where that is too long already."""
        space, stored = self._space, Stored(storage, roles)
        least = [space.expert_floor(storage, roles, label) for label in self._labels]
        best, stays, apart, sizes = [], [], [], []
        negligible = _NEGLIGIBLE * space.evaluator.usable
        for place, label in enumerate(self._labels):
            if not space.limit(storage).allows(self._together(least)):
                return []
            by_gather, n = self._by_gather(stored, label).values(), self._times[place]
            chosen = [(min(found), min(one for one in found if not one[-1])) for found in by_gather]
            best.append(tuple(n * one[0] for one, _ in chosen))
            stays.append(tuple(n * one[0] for _, one in chosen))
            apart.append(tuple(n * min(one[2] for one in found) for found in by_gather))
            sizes += [max(one[1], negligible) for pair in chosen for one in pair]
            soonest = min(one[0] for one, _ in chosen)
            least[place] = max(least[place], space.dense_floor(storage, label) + soonest)
        rows = frozenset(axis for axis, role in zip(space.table.names, roles, strict=True) if role is ExpertRole.REPLICA)
        split = math.prod(size for size, role in zip(space.table.sizes, roles, strict=True) if role in SPLITTING)
        return [(_Figures(tuple(best), tuple(stays), tuple(apart), tuple(sizes), rows, 1.0 / split), Worth(roles, tuple(least)))]

    def _by_gather(self, stored: Stored, label: str) -> dict[tuple[bool, ...], list[tuple[float, int, float, bool]]]:
        """Figures of each choice (`Evaluator.expert_figures`), and whether it gathers experts' matrices, by gathered dense axes."""
        found: dict[tuple[bool, ...], list[tuple[float, int, float, bool]]] = {}
        for gather in self._gathers(stored):
            found.setdefault(gather.dense, []).append((*self._price(stored, gather, label), any(gather.experts)))
        return found

    def _gathers(self, stored: Stored) -> list[Gather]:
        known = self._known_gathers.get(stored)
        if known is None:
            known = self._known_gathers[stored] = gathers(self._space.table, stored)
        return known

    def _price(self, stored: Stored, gather: Gather, label: str) -> tuple[float, int, float]:
        """Seconds that experts take in a step of a phase, and their working set. Both depend on what axes do to tokens, to what passes
        between sublayers, and to experts' matrices, whichever of equal axes does it."""
        table, (roles, experts) = self._space.table, stored
        of_axes = tuple(
            zip(table.class_ids, map(_DOES.__getitem__, zip(roles, gather.dense, strict=True)), experts, gather.experts, strict=True)
        )
        key = (tuple(sorted(of_axes)), gather.exchanged, label, self._beside(stored, gather))
        known = self._known.get(key)
        if known is None:
            *_, alone = table.attentions
            option = PhaseOption(gather, alone)
            known = self._known[key] = self._space.evaluator.expert_figures(table.layout(stored, option, option), label)
        return known

    def _beside(self, stored: Stored, gather: Gather) -> object:
        """What else counts: all roles where dense matrices stand beside the experts; and whether E of experts is split in the order in
        which the dense weights split it, as far as both do."""
        model = self._space.model
        if (model.experts is not None and model.experts.shared) or model.block.parallel:
            return stored, gather
        if not any(has is ExpertRole.EMBED and not gone for has, gone in zip(stored.experts, gather.experts, strict=True)):
            return ()
        dense = [index for role in (Role.EMBED, Role.FFN) for index, has in enumerate(stored.roles) if has is role]
        split = [index for index, has in enumerate(stored.experts) if has is ExpertRole.EMBED]
        return [index for index in split if index in dense] == dense[: sum(index in dense for index in split)]

    def _holds(self, roles: ExpertRoles) -> bool:
        """Whether experts' matrices split as these roles split them; counts the reason if not."""
        if roles not in self._splits:
            self._splits[roles] = expert_offence(self._space.model, roles, self._space.table.sizes)
        reason = self._splits[roles]
        if reason:
            self._space.refused[reason] += 1
        return not reason


def expert_offence(model: ModelConfig, roles: ExpertRoles, sizes: Sequence[int]) -> str:
    """Why experts' matrices do not split so; empty where they do. d_ff is split over the axes of d_model too, between their products."""
    ways = dict.fromkeys(ExpertRole, 1)
    for role, size in zip(roles, sizes, strict=True):
        ways[role] *= size
    of, embed = model.experts, ways[ExpertRole.EMBED]
    assert of is not None
    for label, size, count in (
        ("experts X", of.count, ways[ExpertRole.EXPERT]),
        ("d_ff F of experts", of.each.width, ways[ExpertRole.FFN] * embed),
        ("d_model E of experts", model.embed_dim, embed),
    ):
        if size % count:
            return f"{label} = {size} does not split into {count} parts"
    return ""
