"""The search over meshes: a torus axis, or the devices of a switch, may be split into factors, which then have roles of their own.

The slice's own axes are searched whole. From there on one axis at a time is split in two, of which one part keeps its role: what seems
fastest is refined first, until nothing is left or a budget is spent. It is counted in candidates and not in seconds, so that every machine
finds the same, and what is left out is reported. Without a budget all assignments of all meshes are reached; where nothing can come near
the best that is known they are passed over, as in the search of one mesh.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from partinf.hardware.slices import TORUS_NAMES, Link, MeshAxis, Slice
from partinf.layout import Role
from partinf.planner.candidates import Storage
from partinf.planner.options import BestSoFar
from partinf.planner.question import Question
from partinf.planner.report import PlanReport, answer, report_of
from partinf.planner.results import Candidate, Refused
from partinf.planner.search import MOST_AXES, TIE, Search

# Candidates that are evaluated: by default, including those of the slice's own mesh; with `--mesh auto`, in addition to those.
BUDGET, GREAT_BUDGET = 900, 4_000
_LEAST_BUDGET = 250  # that finer meshes have by default
_LEVEL = 1.1  # estimates of which neither is so many times the other say nothing about which is faster
_Priority = tuple[int, int, float]
_ROLES = (Role.EMBED, Role.FFN, Role.REPLICA, Role.STAGE)


def fastest(question: Question, slice_: Slice) -> PlanReport:
    """The answer of the slice's own mesh, or of a finer one that is faster by more than a tie, within a small budget.

    Raises:
        InvalidInput: as `answer`, of the slice's own mesh.
    """
    refining = _Refining(question, slice_, 1 / TIE)
    return _reports(refining, max(_LEAST_BUDGET, BUDGET - refining.own.space.looked))[0]


def every_mesh(question: Question, slice_: Slice, budget: int | None = GREAT_BUDGET) -> list[PlanReport]:
    """The answer of the best mesh of a slice, and of those that come near it, the fastest first.

    Args:
        budget: candidates that are looked at in addition to those of the slice's own mesh; None for no limit.

    Raises:
        InvalidInput: no mesh that was tried holds the model.
    """
    return _reports(_Refining(question, slice_, TIE), budget)


def _reports(refining: _Refining, budget: int | None) -> list[PlanReport]:
    left = refining.run(budget)
    own = refining.own.slice
    first, *others = sorted(refining.reports(), key=_by_time) or [report_of(refining.own, ())]  # which says why there is none
    if first.slice != own:
        best = first.best
        first = answer(first.question, first.slice, best.score if best.fits and best.meets_bound else math.inf)
    if left:
        reason = f"ways to split the weights over finer meshes, beyond the budget of {budget:,} candidates"
        first = replace(first, refused=(*first.refused, Refused(reason, left)))
    return [first, *others]


def _by_time(report: PlanReport) -> tuple[bool, bool, float]:
    return not report.best.fits, not report.best.meets_bound, report.best.score


class _Refining:
    """The state of a search: what was found on every mesh, and which storages wait to be looked at.

    Attributes:
        own: the search of the slice's own mesh, which is over when the others begin.
    """

    def __init__(self, question: Question, slice_: Slice, near: float) -> None:
        """
        Args:
            near: how many times as slow as the best a finer mesh may be; below 1 it must be faster by that than what was found before it.
        """
        self._question, self._limit = question, BestSoFar(near)
        self.own = Search(question, slice_)
        self._searches: dict[str, Search] = {}
        self._own = self.own.candidates()
        self._found: dict[str, list[Candidate]] = {}
        self._count = itertools.count()
        self._waiting: list[tuple[_Priority, int, Slice, Storage]] = []
        self._seen: set[tuple[str, Storage]] = set()
        for candidate in self._own:
            if candidate.fits and candidate.meets_bound:
                self._limit.see(candidate.score)
        self._searches[slice_.mesh] = self.own
        for storage in self.own.storages:
            self._wait(slice_, storage)

    def run(self, budget: int | None) -> int:
        """Look at all, or at as many candidates; how many storages are left out."""
        looked = 0
        while self._waiting and (budget is None or looked < budget):
            _, _, mesh, storage = heapq.heappop(self._waiting)
            search = self._search(mesh)
            if search is not self.own:
                before = search.space.looked
                self._found.setdefault(mesh.mesh, []).extend(search.candidates([storage]))
                looked += search.space.looked - before
            self._refine(mesh, storage)
        return len(self._waiting)

    def reports(self) -> Iterator[PlanReport]:
        """Of every mesh on which something was found."""
        if self._own:
            yield report_of(self.own, self._own)
        yield from (report_of(self._searches[mesh], found) for mesh, found in self._found.items() if found)

    def _search(self, mesh: Slice) -> Search:
        found = self._searches.get(mesh.mesh)
        if found is None:
            found = self._searches[mesh.mesh] = Search(self._question, mesh, self._limit)
        return found

    def _refine(self, mesh: Slice, storage: Storage) -> None:
        """What comes of a storage by splitting one axis waits, what seems fastest in front."""
        split = [axis.size > 1 and axis.link is not Link.DCN for axis in mesh.axes]
        if sum(split) >= MOST_AXES:
            return
        for index, axis in enumerate(mesh.axes):
            if axis.link not in (Link.TORUS, Link.SWITCH):
                continue
            for first in (size for size in range(2, axis.size // 2 + 1) if axis.size % size == 0):
                finer = _split(mesh, index, first)
                for roles in _pairs_with(storage[index]):
                    self._wait(finer, (*storage[:index], *roles, *storage[index + 1 :]))

    def _wait(self, mesh: Slice, storage: Storage) -> None:
        if (mesh.mesh, storage) not in self._seen:
            self._seen.add((mesh.mesh, storage))
            heapq.heappush(self._waiting, (self._priority(mesh, storage), next(self._count), mesh, storage))

    def _priority(self, mesh: Slice, storage: Storage) -> _Priority:
        """Lowest first: what is estimated to be faster, and of what is level the mesh of fewer axes, whose parts have more to gain."""
        seconds = self._search(mesh).estimate(storage)
        return math.floor(math.log(seconds, _LEVEL)) if seconds else 0, len(mesh.axes), seconds


def _pairs_with(role: Role) -> Iterator[tuple[Role, Role]]:
    """Roles of two parts, of which one is this."""
    yield role, role
    for other in _ROLES:
        if other is not role:
            yield from ((role, other), (other, role))


def _split(mesh: Slice, index: int, first: int) -> Slice:
    """The mesh with one axis in two factors."""
    sizes: dict[str, list[int]] = {}
    for place, axis in enumerate(mesh.axes):
        if axis.link in (Link.TORUS, Link.SWITCH):
            factors = sizes.setdefault(_side(axis), [])
            factors += [first, axis.size // first] if place == index else [axis.size]
    return mesh.with_mesh(",".join(_named(name, factors) for name, factors in sizes.items()))


def _side(axis: MeshAxis) -> str:
    """What the factors of an axis are named after; the devices of a switch have no axes of their own."""
    return axis.torus if axis.link is Link.TORUS else TORUS_NAMES[0]


def _named(name: str, factors: list[int]) -> str:
    """`x:4`, or `x0:2,x1:2` for several factors."""
    return f"{name}:{factors[0]}" if len(factors) == 1 else ",".join(f"{name}{i}:{size}" for i, size in enumerate(factors))
