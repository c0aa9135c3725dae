"""FastServe's scheduler: a multi-level feedback queue that new requests join below the queues which they would pass through anyway.

Queues have quanta q₁ < q₂ < …, each twice the one before, and q₁ is the shortest iteration. Output lengths are unknown, so whoever has
used the quantum of a queue is demoted; whoever has waited longer than α is promoted to the first. The prompt's length is known, and with
it the time of the first iteration: a request joins the first queue whose quantum covers that (skip-join). The naive queue, for comparison,
lets everybody join the first.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from partinf.engine.batch import BatchBuilder
from partinf.engine.policies.ranked import AheadSwapper, Eviction, Pages, fill
from partinf.engine.request import Sequence, Status
from partinf.engine.step_price import Estimates

_DEEPEST = 40  # a quantum of 2⁴⁰ iterations is never used up


@dataclass(eq=False)
class _Entry:
    """Where a request stands: its queue, its place there, service when it joined that queue, and when it ran last."""

    sequence: Sequence
    level: int
    place: int
    joined: float
    last_ran: float
    iterations: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        return self.level, self.place


@dataclass(eq=False)
class MultiLevelFeedbackQueue:
    """Attributes:
    estimates: time of a first iteration by prompt length, and of the shortest iteration, which is the first quantum.
    max_batch_size: sequences per iteration.
    skip_join: False is the naive queue.
    alpha: seconds without an iteration after which a request is promoted.
    pages: what becomes of the pages of those that have to make room.
    promotion_period: iterations from one search for those who have waited too long to the next.
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
        entries = sorted(self._entries.values(), key=lambda entry: entry.rank)
        ranked = [entry.sequence for entry in entries]
        if self.pages.eviction is not Eviction.PROACTIVE:
            return fill(batch, ranked, self.max_batch_size, self.pages)
        by_next_time = self._by_next_time(entries, batch)
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
            self._entries[number] = _Entry(sequence, self._level_for(first), next(self._places), 0.0, sequence.request.arrival)

    def _move(self, now: float) -> None:
        """Forget who is done, demote who has used a quantum, promote who has waited too long."""
        self._iterations += 1
        promotes = self._iterations % self.promotion_period == 0
        for number, entry in list(self._entries.items()):
            sequence = entry.sequence
            if sequence.status in (Status.FINISHED, Status.HELD):
                del self._entries[number]
                continue
            if sequence.num_iterations > entry.iterations or sequence.in_flight:
                entry.iterations, entry.last_ran = sequence.num_iterations, now
            if sequence.attained - entry.joined >= self.quantum(entry.level):
                lower = max(entry.level + 1, self._level_for(self.estimates.decode))
                self._join(entry, min(lower, _DEEPEST))
                self.demotions += 1
            elif promotes and entry.level and now - entry.last_ran > self.alpha:
                self._join(entry, 0)
                entry.last_ran = now
                self.promotions += 1

    def _join(self, entry: _Entry, level: int) -> None:
        entry.level, entry.place, entry.joined = level, next(self._places), entry.sequence.attained

    def _level_for(self, seconds: float) -> int:
        """The first queue whose quantum covers so much service."""
        return min(_DEEPEST, max(0, math.ceil(math.log2(max(seconds / self.estimates.decode, 1.0)) - 1e-9)))

    def _by_next_time(self, entries: list[_Entry], batch: BatchBuilder) -> list[Sequence]:
        """Everybody by estimated next scheduled time (FastServe, section 4.3).

        ENST(i) = min(T_promote(i), T_execute(i)); T_execute(i) = 1/B · Σ over j ahead of i of Σ of the quanta of j's queue down to the
        one before i's: what those ahead may use before they have sunk to i's queue.
        """
        rows = self.max_batch_size or batch.limits.num_slots
        times: dict[int, float] = {}
        num_ahead, sum_ahead = 0, 0.0  # of those in higher queues, and the sum of their queues' quanta
        for level, members in itertools.groupby(entries, key=lambda entry: entry.level):
            group = list(members)
            # The quanta of the queues from j's down to the one before i's add up to qᵢ - qⱼ, because each is twice the one before.
            execute = (num_ahead * self.quantum(level) - sum_ahead) / rows
            for entry in group:
                promote = self.alpha - (batch.now - entry.last_ran)
                times[id(entry)] = min(promote, execute) if level else execute
            num_ahead, sum_ahead = num_ahead + len(group), sum_ahead + len(group) * self.quantum(level)
        return [entry.sequence for entry in sorted(entries, key=lambda entry: (times[id(entry)], entry.rank))]
