"""What experts take in a step, priced once for all roles that come to the same.

It depends on what axes do to tokens, to what passes between sublayers and to experts' matrices, whichever of equal axes does it; and on
whether d_model of experts is split in the order of d_model between sublayers, so that one movement brings their outputs there.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from partinf.layout import ExpertRole, Role
from partinf.planner.candidates import AxisTable, Gather, PhaseOption, Stored, expert_gathers
from partinf.planner.evaluate import Evaluator, ExpertFigures

_Axis = tuple[int, Role, ExpertRole, bool, bool]
Figures = tuple[ExpertFigures, ExpertFigures]  # with what passes between sublayers split, and whole


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


class Choices(NamedTuple):
    """The choices that a phase has with one set of gathered dense axes.

    Attributes:
        best, stays: the fastest, and the fastest that gathers no experts' matrices, both by what passes between sublayers.
        apart: of all choices the least, likewise.
    """

    best: Figures
    stays: Figures
    apart: tuple[float, float]

    @property
    def seconds(self) -> float:
        """Of the fastest."""
        return min(one.seconds for one in self.best)


class ExpertPrices:
    """What experts take over the axes of one mesh."""

    def __init__(self, table: AxisTable, evaluator: Evaluator) -> None:
        self._table, self._evaluator = table, evaluator
        self._figures: dict[object, Figures] = {}
        self._choices: dict[object, Choices] = {}
        self._order: dict[Stored, bool] = {}
        self._codes: dict[_Axis, int] = {}
        self._numbers: dict[tuple[object, ...], int] = {}

    def __call__(self, stored: Stored, gather: Gather, label: str) -> Figures:
        """Under roles in storage and gathered axes."""
        axes = zip(self._table.class_ids, stored.roles, stored.experts, gather.dense, gather.experts, strict=True)
        key = (tuple(sorted([self._code(axis) for axis in axes])), gather.exchanged, label, self._in_order(stored))
        known = self._figures.get(key)
        if known is None:
            *_, alone = self._table.attentions
            option = PhaseOption(gather, alone)
            known = self._figures[key] = self._evaluator.expert_figures(self._table.layout(stored, option, option), label)
        return known

    def _code(self, axis: _Axis) -> int:
        """A number for what one axis is and does: its class, its role, experts' role, and whether either is gathered over it."""
        found = self._codes.get(axis)
        if found is None:
            kind, role, experts, dense, gathered = axis
            found = self._codes[axis] = self._numbers.setdefault((kind, _DOES[role, dense], experts, gathered), len(self._numbers))
        return found

    def choices(self, stored: Stored, dense: tuple[bool, ...], label: str) -> Choices:
        """All choices of a phase that gathers dense weights over these axes."""
        does = [_DOES[one] for one in zip(stored.roles, dense, strict=True)]
        key = (tuple(sorted(zip(self._table.class_ids, does, stored.experts, strict=True))), label, self._in_order(stored))
        known = self._choices.get(key)
        if known is None:
            known = self._choices[key] = self._choose(stored, dense, label)
        return known

    def _choose(self, stored: Stored, dense: tuple[bool, ...], label: str) -> Choices:
        every = [(self(stored, gather, label), any(gather.experts)) for gather in expert_gathers(self._table, stored, dense)]
        best = min(one[0] for one, _ in every), min(one[1] for one, _ in every)
        stays = min(one[0] for one, gathered in every if not gathered), min(one[1] for one, gathered in every if not gathered)
        return Choices(best, stays, (min(one[0].apart for one, _ in every), min(one[1].apart for one, _ in every)))

    def _in_order(self, stored: Stored) -> bool:
        known = self._order.get(stored)
        if known is None:
            roles, experts = stored
            dense = [index for role in (Role.EMBED, Role.FFN) for index, has in enumerate(roles) if has is role]
            split = [index for index, has in enumerate(experts) if has is ExpertRole.EMBED]
            digits = split + [index for index in dense if index not in split]
            known = self._order[stored] = digits == dense + [index for index in digits if index not in dense]
        return known
