"""FastServe's scheduler: a multi-level feedback queue that new requests join below the queues which they would pass through anyway.

Queues have quanta q₁ < q₂ < …, each twice the one before, and q₁ is the shortest iteration. Output lengths are unknown, so a sequence that
has used the quantum of a queue is demoted; one that has waited longer than α is promoted to the first. The prompt's length is known, and
with it the time of the first iteration: a request joins the first queue whose quantum covers that (skip-join). The naive queue, for
comparison, lets every sequence join the first.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter

from partinf.engine.batch import BatchBuilder
from partinf.engine.estimates import Estimates
from partinf.engine.policies.ranked import AheadSwapper, Eviction, Pages, fill
from partinf.engine.request import Sequence, Status

_DONE = (Status.FINISHED, Status.HELD)
_DEEPEST = 40  # a quantum of 2⁴⁰ iterations is never used up


@dataclass(eq=False)
class _Entry:
    """Where a request stands: its queue, its place there, service when it joined that queue, what it may have there, and when it ran
    last."""

    sequence: Sequence
    level: int
    place: int
    joined: float
    quantum: float
    last_ran: float
    iterations: int = 0


_rank = attrgetter("level", "place")


@dataclass(eq=False)
class MultiLevelFeedbackQueue:
    """Attributes:
    estimates: time of a first iteration by prompt length, and of the shortest iteration, which is the first quantum.
    max_batch_size: sequences per iteration.
    skip_join: False is the naive queue.
    alpha: seconds without an iteration after which a request is promoted.
    pages: what becomes of the pages of those that have to make room.
    promotion_period: iterations from one search for sequences that have waited too long to the next.
    """

    estimates: Estimates
    max_batch_size: int | None = None
    skip_join: bool = True
    alpha: float = 0.3
    pages: Pages = field(default_factory=Pages)
    promotion_period: int = 1
    demotions: int = 0
    promotions: int = 0
    _entries: dict[int, _Entry] = field(default_factory=dict, repr=False)
    _ranked: list[_Entry] = field(default_factory=list, repr=False)  # the same, nearly in order: as they were in the last iteration
    _places: itertools.count[int] = field(default_factory=itertools.count, repr=False)
    _iterations: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        self._swap_ahead = AheadSwapper(self.pages)

    def quantum(self, level: int) -> float:
        """Service in seconds after which a queue (from 0) demotes."""
        return self.estimates.decode * 2.0**level

    def schedule(self, batch: BatchBuilder) -> None:
        self._meet(batch)
        self._move(batch.now)
        self._ranked.sort(key=_rank)
        ranked = [entry.sequence for entry in self._ranked]
        if self.pages.eviction is not Eviction.PROACTIVE:
            return fill(batch, ranked, self.max_batch_size, self.pages)
        by_next_time = self._by_next_time(batch)
        self._swap_ahead.make_slot(batch, by_next_time)
        fill(batch, ranked, self.max_batch_size, self.pages)
        self._swap_ahead(batch, by_next_time)

    def _meet(self, batch: BatchBuilder) -> None:
        """Let those join that have arrived since the last iteration."""
        for sequence in batch.waiting:
            number = sequence.request.number
            if number in self._entries:
                continue
            first = self.estimates.first_iteration(len(sequence.tokens)) if self.skip_join else 0.0
            level = self._level_for(first)
            entry = _Entry(sequence, level, next(self._places), 0.0, self.quantum(level), sequence.request.arrival)
            self._entries[number] = entry
            self._ranked.append(entry)

    def _move(self, now: float) -> None:
        """Forget who is done, demote who has used a quantum, promote who has waited too long."""
        self._iterations += 1
        promotes = self._iterations % self.promotion_period == 0
        done = [number for number, entry in self._entries.items() if entry.sequence.status in _DONE]
        for number in done:
            self._ranked.remove(self._entries.pop(number))
        for entry in self._entries.values():
            sequence = entry.sequence
            if sequence.num_iterations > entry.iterations or sequence.in_flight:
                entry.iterations, entry.last_ran = sequence.num_iterations, now
            if sequence.attained - entry.joined >= entry.quantum:
                lower = max(entry.level + 1, self._level_for(self.estimates.decode))
                self._join(entry, min(lower, _DEEPEST))
                self.demotions += 1
            elif promotes and entry.level and now - entry.last_ran > self.alpha:
                self._join(entry, 0)
                entry.last_ran = now
                self.promotions += 1

    def _join(self, entry: _Entry, level: int) -> None:
        entry.level, entry.place = level, next(self._places)
        entry.joined, entry.quantum = entry.sequence.attained, self.quantum(level)

    def _level_for(self, seconds: float) -> int:
        """The first queue whose quantum covers so much service."""
        return min(_DEEPEST, max(0, math.ceil(math.log2(max(seconds / self.estimates.decode, 1.0)) - 1e-9)))

    def _by_next_time(self, batch: BatchBuilder) -> list[Sequence]:
        """All sequences by estimated next scheduled time (FastServe, section 4.3), and by rank where that is the same.

        ENST(i) = min(T_promote(i), T_execute(i)); T_execute(i) = 1/B · Σ over j ahead of i of Σ of the quanta of j's queue down to the
        one before i's: what those ahead may use before they have sunk to i's queue.
        """
        rows = self.max_batch_size or batch.limits.num_slots
        times: list[tuple[float, Sequence]] = []
        num_ahead, sum_ahead = 0, 0.0  # of those in higher queues, and the sum of their queues' quanta
        for level, members in itertools.groupby(self._ranked, key=attrgetter("level")):
            group = list(members)
            # The quanta of the queues from j's down to the one before i's add up to qᵢ - qⱼ, because each is twice the one before.
            execute = (num_ahead * self.quantum(level) - sum_ahead) / rows
            for entry in group:
                promote = self.alpha - (batch.now - entry.last_ran)
                times.append((min(promote, execute) if level else execute, entry.sequence))
            num_ahead, sum_ahead = num_ahead + len(group), sum_ahead + len(group) * self.quantum(level)
        return [sequence for _, sequence in sorted(times, key=itemgetter(0))]
