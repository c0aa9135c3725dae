"""The page pool: who owns which page of the KV cache. It counts pages; what they hold is the runner's.

Pages belong to the shards of the decode batch axes, and all pages of a sequence are on one shard, round-robin over its sequence shards: a
sequence's next page is wanted on a certain one. The cache has groups (`partinf.engine.group_pool`): one that keeps all positions, and one
for every window, whose pages are let go once no later query sees them. A sequence has pages of all groups, or of none. Slots, the lanes
in which the runner keeps each resident sequence's last token, are one range for all shards. Pages that hold the same tokens after the same
tokens are shared by the samples of a request, and by all where prefix caching is on: a page has as many references as holders.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

from partinf.engine.group_pool import GroupPool
from partinf.engine.request import HeldPages, Sequence
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import PageCopy
from partinf.foundation.paging import first_page


class _Found(NamedTuple):
    """Pages of a sequence's beginning that are there already: how many, and by group those of them that a later query sees."""

    num_pages: int
    pages: tuple[list[int], ...]


class PagePool:
    """Pages by group, and free slots.

    A shard takes at most `max_decode_rows_per_shard` sequences, so that all residents can always decode in the same step, unless the
    policy wants more residents than rows.

    Attributes:
        groups: as in `RunnerLimits.groups`.
    """

    def __init__(self, limits: RunnerLimits, prefix_caching: bool = False) -> None:
        self._limits = limits
        self._caching = prefix_caching and limits.chunks
        self.groups = tuple(GroupPool(index, limits, self._caching) for index in range(len(limits.groups)))
        self._windows = tuple(group for group in self.groups if group.window)
        self._nothing = _Found(0, tuple([] for _ in self.groups))
        self._free_slots = list(range(limits.num_slots))
        self._num_sequences = [0] * limits.num_shards

    @property
    def num_free_pages(self) -> int:
        """Pages that sequences may still be given, of the group that keeps all positions, or else of the first."""
        return self.groups[0].num_available

    @property
    def used(self) -> float:
        """Share of the pages that are in use, in the group that has fewest left."""
        return max(1 - group.num_free / group.num_pages for group in self.groups)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_free_host_pages(self) -> int:
        """Of the group that has fewest."""
        return min(len(group.free_host_pages) for group in self.groups)

    def free_pages(self, shard: int) -> int:
        """The same of one shard that any one sequence can have."""
        return self.groups[0].available(shard)

    def missing_pages(self, sequence: Sequence, num_pages: int) -> int:
        """Pages beyond those that are free, where they are wanted, that a resident sequence needs to have so many."""
        return 0 if self.groups[0].window else self.groups[0].missing(sequence.held[0], num_pages, sequence.shard)

    def choose_shard(self, num_pages: int, shards: Iterable[int], sequence: Sequence | None = None, crowd: bool = False) -> int | None:
        """The shard that takes another sequence of so many pages; None when none of `shards` has room.

        Fewest sequences, then most free pages, then the first: a decode step is padded to the fullest shard, hence sequences before
        pages. Among shards that have at most one sequence more than the emptiest, the longest cached prefix comes before that.

        Args:
            sequence: whose prefix to look for. crowd: let more sequences live on a shard than it has decode rows.
        """
        if not self._free_slots:
            return None
        most = self._limits.num_slots if crowd else self._limits.max_decode_rows_per_shard * self._limits.num_stages
        found = {shard: self._nothing if sequence is None else self._find(sequence, shard) for shard in shards}
        fitting = [s for s, cached in found.items() if self._num_sequences[s] < most and self._has_room(sequence, num_pages, s, cached)]
        if not fitting:
            return None
        crowded = min(self._num_sequences[s] for s in fitting) + 1
        return min(
            fitting,
            key=lambda s: (self._num_sequences[s] > crowded, -found[s].num_pages, self._num_sequences[s], -self.free_pages(s), s),
        )

    def allocate(self, sequence: Sequence, num_pages: int, shard: int) -> int:
        """Give the sequence a slot and pages of a shard that `choose_shard` named; returns how many of its first pages are cached already.
        Pages of windows it gets as it comes to them (`grow`)."""
        found = self._find(sequence, shard)
        if not sequence.held:
            sequence.held = tuple(HeldPages() for _ in self.groups)
        assert self._has_room(sequence, num_pages, shard, found), f"shard {shard} has no room for {num_pages} pages"
        sequence.shard = shard
        sequence.slot = heapq.heappop(self._free_slots)
        for group, cached in zip(self.groups, found.pages, strict=True):
            group.admit(sequence, num_pages, shard, found.num_pages, cached)
        self._num_sequences[shard] += 1
        self._cover(sequence)
        return found.num_pages

    def grow(self, sequence: Sequence, num_pages: int) -> bool:
        """Bring a resident sequence to so many pages; False, and nothing changed, when its shard has not enough."""
        if self.missing_pages(sequence, num_pages):
            return False
        for group, held in zip(self.groups, sequence.held, strict=True):
            group.extend(held, num_pages, sequence.shard)
        sequence.num_covered = max(sequence.num_covered, num_pages * self._limits.page_size)
        return True

    def trim(self, sequences: Iterable[Sequence]) -> None:
        """Let go what no later query of these residents sees."""
        for sequence in sequences if self._windows else ():
            for group in self._windows:
                group.trim(sequence)

    def free(self, sequence: Sequence) -> None:
        """Take back what `allocate` and `grow` gave, and what is in host memory."""
        for group, held in zip(self.groups, sequence.held, strict=False):
            group.free_host_pages.extend(reversed(held.host_pages))
            held.host_pages = []
        if sequence.slot < 0:
            return
        self.remember(sequence, min(sequence.num_scheduled, len(sequence.tokens) - 1))
        for group in self.groups:
            group.release(sequence)
        heapq.heappush(self._free_slots, sequence.slot)
        self._num_sequences[sequence.shard] -= 1
        sequence.shard, sequence.slot, sequence.num_readable, sequence.started_slot = -1, -1, 0, False
        self._cover(sequence)

    def swap_out(self, sequence: Sequence) -> tuple[PageCopy, ...] | None:
        """Free what the sequence holds on the device, its written pages of all groups for as many of host memory; None when one is full."""
        end = self._limits.pages_for(sequence.num_scheduled)
        used = [end - held.first for held in sequence.held]
        if any(count > len(group.free_host_pages) for count, group in zip(used, self.groups, strict=True)):
            return None
        copies = []
        for index, (group, held, count) in enumerate(zip(self.groups, sequence.held, used, strict=True)):
            host_pages = tuple(group.free_host_pages.pop() for _ in range(count))
            copies.append(PageCopy(tuple(held.pages[:count]), host_pages, sequence.shard, index, held.first))
        sequence.home = sequence.shard
        self.free(sequence)
        for held, copy in zip(sequence.held, copies, strict=True):
            held.first, held.host_pages = copy.first, list(copy.host_pages)
        return tuple(copy for copy in copies if copy.pages)

    def swap_in(self, sequence: Sequence, num_pages: int) -> tuple[PageCopy, ...]:
        """The way back, home, where `choose_shard` has found room. The host's pages are free once the step has been put together."""
        places = [(held.first, tuple(held.host_pages)) for held in sequence.held]
        self.allocate(sequence, num_pages, sequence.home)
        copies = []
        for index, (group, held, (first, host_pages)) in enumerate(zip(self.groups, sequence.held, places, strict=True)):
            group.extend(held, first + len(host_pages), sequence.shard)
            held.host_pages = []
            group.leaving_host_pages += reversed(host_pages)
            copies.append(PageCopy(tuple(held.pages[: len(host_pages)]), host_pages, sequence.shard, index, first))
        self._cover(sequence)
        return tuple(copy for copy in copies if copy.pages)

    def step_is_built(self) -> None:
        """What the step reads from host memory may be overwritten by the next one."""
        for group in self.groups:
            group.free_host_pages += group.leaving_host_pages
            group.leaving_host_pages = []

    def remember(self, sequence: Sequence, num_positions: int) -> None:
        """Let later steps find the full pages of these positions, which have been written by the steps scheduled so far."""
        if self._caching:
            for group, held in zip(self.groups, sequence.held, strict=True):
                group.prefixes[sequence.shard].remember(sequence, held, num_positions)

    def forget_prefixes(self) -> None:
        """The pages were lost."""
        for group in self.groups:
            for shard, cache in enumerate(group.prefixes):
                group.take_back(shard, cache.clear())

    def forget(self, sequence: Sequence) -> None:
        """What this sequence, which has ended, wrote shall not be found any more."""
        for group in self.groups:
            for shard, cache in enumerate(group.prefixes):
                group.take_back(shard, cache.forget(sequence))

    def check(self, residents: Iterable[Sequence], swapped: Iterable[Sequence] = ()) -> None:
        """Assert conservation: of the pages of every group (`GroupPool.check`), of slots, and of sequences per shard."""
        residents, swapped = list(residents), list(swapped)
        for group in self.groups:
            group.check(residents, swapped)
        slots = self._free_slots + [sequence.slot for sequence in residents]
        assert sorted(slots) == list(range(self._limits.num_slots)), "slots are lost or held twice"
        for shard, count in enumerate(self._num_sequences):
            here = sum(sequence.shard == shard for sequence in residents)
            assert count == here, f"shard {shard} counts {count} sequences, {here} live"
        for sequence in residents:
            covered = min(held.end for held in sequence.held) * self._limits.page_size
            assert sequence.num_covered == covered >= sequence.num_scheduled, f"request {sequence.request.id} lacks pages"

    def _cover(self, sequence: Sequence) -> None:
        """Note how far its pages reach."""
        sequence.num_covered = min(held.end for held in sequence.held) * self._limits.page_size
        sequence.pages_changed()

    def _has_room(self, sequence: Sequence | None, num_pages: int, shard: int, found: _Found) -> bool:
        return all(group.has_room(sequence, num_pages, shard, cached) for group, cached in zip(self.groups, found.pages, strict=True))

    def _find(self, sequence: Sequence, shard: int) -> _Found:
        """Pages of the sequence's beginning that are there already: cached ones, or those of another sample of its request.

        They end where the group that keeps all positions has everything, and each window what the next query sees. One token at least is
        left to compute: the one whose successor is wanted; all are where log-probabilities of the prompt are.
        """
        if sequence.num_scheduled or sequence.scoring or not (self._caching or sequence.family):
            return self._nothing_yet()
        most = (len(sequence.tokens) - 1) // self._limits.page_size
        cached = self._find_cached(sequence, shard, most) if self._caching else self._nothing_yet()
        for other in sequence.family:
            count = min(min(other.num_readable, sequence.shared_len) // self._limits.page_size, most)
            if other.shard == shard and count > cached.num_pages:
                firsts = [self._first(group, count) for group in self.groups]
                if all(held.first <= first for held, first in zip(other.held, firsts, strict=True)):
                    pairs = zip(other.held, firsts, strict=True)
                    cached = _Found(count, tuple(held.pages[first - held.first : count - held.first] for held, first in pairs))
        return cached

    def _nothing_yet(self) -> _Found:
        return _Found(0, tuple([] for _ in self.groups))

    def _find_cached(self, sequence: Sequence, shard: int, most: int) -> _Found:
        chain = [] if self.groups[0].window else self.groups[0].prefixes[shard].find(sequence, most)
        reach = most if self.groups[0].window else len(chain)
        tails = [group.prefixes[shard].find_each(sequence, reach) for group in self._windows]
        ends = [True] * (reach + 1)  # whether all windows have what a query after so many pages sees
        for group, pages in zip(self._windows, tails, strict=True):
            run = 0
            for count, page in enumerate(pages, start=1):
                run = 0 if page is None else run + 1
                ends[count] &= run >= count - self._first(group, count)
        count = next(count for count in range(reach, -1, -1) if ends[count])
        found = [] if self.groups[0].window else [chain[:count]]
        for group, pages in zip(self._windows, tails, strict=True):
            found.append([page for page in pages[self._first(group, count) : count] if page is not None])
        return _Found(count, tuple(found))

    def _first(self, group: GroupPool, count: int) -> int:
        """The first page of a group that a query after so many pages sees."""
        size = self._limits.page_size
        return first_page(count * size, group.window, size) if group.window else 0
