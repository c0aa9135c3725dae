"""What policies with a ranking share: fill the batch from the best down, and take pages from the worst when they run out.

A sequence can be preempted after every token. What becomes of its pages is the second half of such a policy: computed again later,
moved to host memory when another needs room (reactive) or before (proactive), or never taken away, so that new requests wait (defer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from partinf.engine.batch import BatchBuilder
from partinf.engine.estimates import Estimates
from partinf.engine.request import Sequence as Request
from partinf.engine.request import Status


class Eviction(StrEnum):
    """What becomes of the pages of a sequence that has to make room; see the module."""

    RECOMPUTE = "recompute"
    REACTIVE = "reactive"
    PROACTIVE = "proactive"
    DEFER = "defer"


@dataclass(frozen=True)
class Pages:
    """How a ranked policy treats pages.

    Attributes:
        estimates: of a copy in each direction, and of computing again: whichever is shorter is done. None always swaps where it may.
        reserve: share of each pool that proactive swapping keeps free for bursts.
    """

    eviction: Eviction = Eviction.RECOMPUTE
    estimates: Estimates | None = None
    reserve: float = 0.1

    @property
    def reserves_at_start(self) -> bool:
        return self.eviction is Eviction.DEFER

    def evict(self, batch: BatchBuilder, victim: Request) -> None:
        """Take a resident's pages the cheaper way that is allowed; computing again is always possible."""
        if self.eviction is Eviction.RECOMPUTE or not self.swapping_pays(victim) or not batch.swap_out(victim):
            batch.preempt(victim)

    def swapping_pays(self, victim: Request) -> bool:
        """Whether two copies take less time than computing a resident's pages again."""
        if self.estimates is None:
            return True
        copies = self.estimates.pages_for(victim.num_scheduled) * (self.estimates.page_out + self.estimates.page_in)
        return copies < self.estimates.first_iteration(victim.num_scheduled)


def fill(batch: BatchBuilder, ranked: Sequence[Request], max_batch_size: int | None, pages: Pages) -> None:
    """Run the best of `ranked` (best first) that fit into the batch; those below make room for those above.

    When one does not fit although all below it have made room, those below still run if they need no room themselves. Where pages are
    swapped ahead, only residents and those that find free pages run, unless no sequence is resident.
    """
    most = batch.most_rows(max_batch_size)
    victims = [one for one in ranked if _evictable(one)] if not pages.reserves_at_start else []
    blocked, ahead = False, pages.eviction is Eviction.PROACTIVE
    kept = 0  # slots for those in host memory who come before the others outside
    for place, sequence in enumerate(ranked):
        if batch.num_rows >= most:
            return
        if sequence.status is not Status.RUNNING and (blocked or (sequence.status is Status.WAITING and batch.prefill_is_full)):
            continue
        if ahead and sequence.status is not Status.RUNNING and batch.num_resident:
            if sequence.status is Status.SWAPPED:
                kept = 1
            elif batch.num_free_slots > kept:
                _bring(batch, sequence, pages)  # what lacks room is swapped ahead of the next iteration
            continue
        if batch.taken(sequence) or _bring(batch, sequence, pages):
            continue
        if blocked or sequence.in_flight or not _short_of_pages(batch, sequence):
            continue
        blocked = not _make_room(batch, sequence, victims, ranked[: place + 1], pages)


def _bring(batch: BatchBuilder, sequence: Request, pages: Pages) -> bool:
    """Make a sequence resident if it is not, and run it."""
    if sequence.status is Status.WAITING:
        return batch.start(sequence, reserve=pages.reserves_at_start, crowd=True)
    if sequence.status is Status.SWAPPED and not batch.swap_in(sequence):
        return False
    return sequence.status is Status.RUNNING and batch.ready(sequence) and batch.run(sequence)


def _short_of_pages(batch: BatchBuilder, sequence: Request) -> bool:
    """Whether it is pages or slots that a sequence lacks, and not its turn in the pipeline or room in the step."""
    if sequence.status is Status.RUNNING:
        return batch.ready(sequence) and batch.missing_pages(sequence) > 0
    return sequence.status is Status.SWAPPED or batch.can_prefill(sequence)


def _make_room(batch: BatchBuilder, sequence: Request, victims: list[Request], better: Sequence[Request], pages: Pages) -> bool:
    """Evict the worst ranked one by one until the sequence runs; False when none ranked below it is left. Those who live elsewhere are
    spared by one that must run on a certain shard, unless it is a slot that is missing."""
    spared, shard, elsewhere = {id(one) for one in better}, _needed_shard(sequence), list[Request]()
    made = False
    while victims and not made and id(victims[-1]) not in spared:
        victim = victims.pop()
        if shard is not None and victim.shard != shard and (sequence.status is Status.RUNNING or batch.num_free_slots):
            elsewhere.append(victim)
        elif _evictable(victim) and not batch.taken(victim):
            pages.evict(batch, victim)
            made = _bring(batch, sequence, pages)
    victims.extend(reversed(elsewhere))
    return made


def _needed_shard(sequence: Request) -> int | None:
    """The one shard on which it can run, if it has or had pages there."""
    if sequence.status is Status.SWAPPED:
        return sequence.home
    return sequence.shard if sequence.status is Status.RUNNING else None


def _evictable(sequence: Request) -> bool:
    """A resident whose prefill is not in the middle: it is never interrupted, or two long ones could take turns for ever."""
    return sequence.status is Status.RUNNING and sequence.num_scheduled >= sequence.prefill_len


def _outside(sequence: Request) -> bool:
    """Whether a sequence needs a slot to go on, and would take one now."""
    return sequence.status in (Status.WAITING, Status.SWAPPED) and not sequence.in_flight and not sequence.waits_for_first


class AheadSwapper:
    """Proactive swapping (FastServe, section 4.3): pages move before they are needed, no faster than the link carries them.

    A reserve of pages is held free for bursts; the sequence that is expected to run last leaves for it, and for those in host memory that
    are expected to run first. A step never waits for a copy, because no sequence runs in the iteration that brings its pages. Slots hold
    nothing that has to be moved, so they are made free when they are needed.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._last = 0.0
        self._credit = 0.0

    def make_slot(self, batch: BatchBuilder, by_next_time: Sequence[Request]) -> None:
        """Before the batch is filled: where all slots are held, the one that is expected to run last leaves for one outside that comes
        before it."""
        if batch.num_free_slots or self._credit <= 0:
            return
        victim = next((one for one in reversed(by_next_time) if _evictable(one)), None)
        first = next((one for one in by_next_time if one is victim or _outside(one)), None)
        if victim is not None and first is not victim:
            self._pages.evict(batch, victim)
            self._credit -= victim.num_host_pages

    def __call__(self, batch: BatchBuilder, by_next_time: Sequence[Request]) -> None:
        """Add this iteration's copies to the batch.

        Args:
            by_next_time: all sequences, the one that is expected to run first in front.
        """
        self._earn(batch.now)
        reserve = int(self._pages.reserve * batch.limits.groups[0].pages_per_shard * batch.limits.num_shards)
        coming = [one for one in by_next_time if one.status is Status.SWAPPED and not one.in_flight]
        first, needed = (coming[0], coming[0].num_host_pages + 1) if coming else (None, 0)
        for victim in reversed(by_next_time):
            if victim is first:  # the others come before it, and leave for the reserve alone
                first = None
            if not _evictable(victim) or batch.taken(victim) or victim.in_flight:
                continue
            if batch.free_pages() >= reserve:
                if first is None:
                    break
                short = batch.free_pages() < reserve + needed
                if not short and (victim.shard != first.home or batch.free_pages(first.home) >= needed):
                    continue
            if self._credit <= 0 or not self._pages.swapping_pays(victim) or not batch.swap_out(victim):
                break  # computing again is for sequences that need room now
            self._credit -= victim.num_host_pages
        for sequence in coming:
            num_pages = sequence.num_host_pages
            if not batch.num_free_slots or self._credit <= 0 or batch.free_pages() - num_pages - 1 < reserve:
                break
            if batch.swap_in(sequence):
                self._credit -= num_pages

    def _earn(self, now: float) -> None:
        """Pages that the link has carried since the last iteration may be followed by as many."""
        estimates = self._pages.estimates
        if estimates is None or not estimates.page_in:
            self._credit = float("inf")
            return
        carried = (now - self._last) / max(estimates.page_in, estimates.page_out)
        self._credit, self._last = min(self._credit + carried, carried), now


def all_requests(batch: BatchBuilder) -> Iterable[Request]:
    """All that are not done and may be in the next step, wherever their pages are."""
    yield from batch.running
    yield from batch.swapped
    yield from batch.waiting


@dataclass
class Ranked:
    """A policy that is nothing but a ranking: the lowest key first.

    Attributes:
        key: of a sequence, compared anew in every iteration. name: for messages.
    """

    key: Callable[[Request], tuple[float, ...]]
    name: str = "ranked"
    max_batch_size: int | None = None
    pages: Pages = field(default_factory=Pages)

    def __post_init__(self) -> None:
        self._swap_ahead = AheadSwapper(self.pages)

    def schedule(self, batch: BatchBuilder) -> None:
        ranked = sorted(all_requests(batch), key=self.key)
        if self.pages.eviction is Eviction.PROACTIVE:
            self._swap_ahead.make_slot(batch, ranked)
        fill(batch, ranked, self.max_batch_size, self.pages)
        if self.pages.eviction is Eviction.PROACTIVE:
            self._swap_ahead(batch, ranked)
