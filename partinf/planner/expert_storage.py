"""Which roles for experts' matrices are worth considering with some roles for dense weights.

What experts take is added to a step whatever attention does, and depends on the dense roles only through the axes that split tokens
and what passes between sublayers. Of the roles for experts with one storage therefore only those remain that no others beat: these would
be no slower over all steps of all phases, whatever axes each phase gathers dense weights over and however it splits what passes between
sublayers, with experts' matrices gathered as is best and not at all; no larger, in the matrices and in a layer's working set; and would
spread rows over no further axes, which pad a small batch. Whatever else is chosen, what was left out would have been slower or larger with
the same choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from partinf.layout import ExpertRole
from partinf.model.config import ModelConfig
from partinf.planner.candidates import SPLITTING, ExpertRoles, Storage, Stored, expert_roles, gathers
from partinf.planner.options import Space

NO_FASTER = "roles for experts that are no faster than others with the same dense weights"
_NEGLIGIBLE = 0.01  # of the memory that a program may use: working sets below it are as good as none

_ByPhase = tuple[tuple[float, ...], ...]


class Worth(NamedTuple):
    """Roles for experts that are worth looking at, and what a step of each phase takes at least."""

    experts: ExpertRoles
    seconds: tuple[float, ...]


class _Figures(NamedTuple):
    """What counts, less being better.

    Attributes:
        best, stays: for every phase, set of gathered axes and split of what passes between sublayers, seconds of all its steps, with
            experts' matrices gathered as is best, and not gathered. sizes: the working sets of these.
        apart, least_apart: seconds without those that leave HBM alone: of the best, and the least of any.
        rows: the axes that copy experts. share: of all experts' matrices, what one device has.
    """

    best: _ByPhase
    stays: _ByPhase
    apart: _ByPhase
    least_apart: _ByPhase
    sizes: tuple[float, ...]
    rows: frozenset[str]
    share: float

    def beats(self, other: _Figures) -> bool:
        """Whether it is no slower over all phases together, whatever is gathered in each, and in nothing larger."""
        if not (self.rows <= other.rows and self.share <= other.share):
            return False
        if any(mine > others for mine, others in zip(self.sizes, other.sizes, strict=True)):
            return False
        pairs = (self.best, other.best), (self.stays, other.stays), (self.apart, other.least_apart)
        return all(_most_slower(mine, others) <= 0.0 for mine, others in pairs)


def _most_slower(mine: _ByPhase, others: _ByPhase) -> float:
    """By how much one is slower than another at most, over what each phase may choose."""
    phases = zip(mine, others, strict=True)
    return sum(max(one - other for one, other in zip(*phase, strict=True)) for phase in phases)


class ExpertStorage:
    """The roles for experts over one slice."""

    def __init__(self, space: Space, labels: Sequence[str], times: Sequence[int]) -> None:
        """
        Args:
            times: number of steps of each phase.
        """
        self._space, self._labels, self._times = space, labels, times
        self._splits: dict[ExpertRoles, str] = {}

    def worth_considering(self, storage: Storage) -> list[Worth]:
        """The roles worth considering with a storage, the fastest in all phases together first; all where nothing is passed over."""
        space = self._space
        if space.model.experts is None:
            return [Worth((), tuple(space.soonest(storage, label) for label in self._labels))]
        every = [roles for roles in expert_roles(space.table, storage) if self._holds(roles)]
        if space.cut is None:
            return [Worth(roles, (0.0,) * len(self._labels)) for roles in every]
        dense = list(dict.fromkeys(gather.dense for gather in gathers(space.table, Stored(storage))))
        figured = [one for roles in every for one in self._figured(storage, roles, dense)]
        kept: list[tuple[_Figures, Worth]] = []
        for figures, worth in sorted(figured, key=lambda one: self._together(one[1].seconds)):
            if not any(other.beats(figures) for other, _ in kept):
                kept.append((figures, worth))
        space.refused[NO_FASTER] += len(every) - len(kept)
        return [worth for _, worth in kept]

    def _together(self, seconds: Iterable[float]) -> float:
        return sum(n * one for n, one in zip(self._times, seconds, strict=True))

    def _figured(self, storage: Storage, roles: ExpertRoles, dense: Sequence[tuple[bool, ...]]) -> list[tuple[_Figures, Worth]]:
        """One, with what a step of each phase takes at least; none where that is too long already."""
        space, stored = self._space, Stored(storage, roles)
        floors = space.floors
        without = [[floors.without_experts(storage, one, label) for one in dense] for label in self._labels]
        least = [min(others) + floors.experts(roles, label) for others, label in zip(without, self._labels, strict=True)]
        best, stays, apart, least_apart, sizes = [], [], [], [], []
        negligible = _NEGLIGIBLE * space.evaluator.usable
        for place, label in enumerate(self._labels):
            if not space.limit(storage).allows(self._together(least)):
                return []
            found, n = [space.experts.choices(stored, one, label) for one in dense], self._times[place]
            best.append(tuple(n * one.seconds for choice in found for one in choice.best))
            stays.append(tuple(n * one.seconds for choice in found for one in choice.stays))
            apart.append(tuple(n * one.apart for choice in found for one in choice.best))
            least_apart.append(tuple(n * one for choice in found for one in choice.apart))
            sizes += [max(one.size, negligible) for choice in found for one in (*choice.best, *choice.stays)]
            least[place] = max(least[place], min(one.seconds + others for one, others in zip(found, without[place], strict=True)))
        if not space.limit(storage).allows(self._together(least)):
            return []
        rows = frozenset(axis for axis, role in zip(space.table.names, roles, strict=True) if role is ExpertRole.REPLICA)
        split = math.prod(size for size, role in zip(space.table.sizes, roles, strict=True) if role in SPLITTING)
        figures = _Figures(tuple(best), tuple(stays), tuple(apart), tuple(least_apart), tuple(sizes), rows, 1.0 / split)
        return [(figures, Worth(roles, tuple(least)))]

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
