"""The page pool: who owns which page of the KV cache. It counts pages; what they hold is the runner's.

Pages belong to the shards of the decode batch axes, `pages_per_shard` each, and all pages of a sequence lie on one shard, dealt in turn
over its parts: a sequence's next page is wanted in a certain part. Slots, the lanes in which the runner keeps each resident sequence's
last token, are one range for all shards. Pages that hold the same tokens after the same tokens are shared by the samples of a request,
and by all where prefix caching is on: a page has as many references as holders.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from operator import add, le

from partinf.engine.prefix_cache import PrefixCache
from partinf.engine.request import Sequence
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import PageCopy
from partinf.foundation.rounding import ceil_div


class PagePool:
    """Free pages per part of every shard, free pages of host memory, and free slots.

    A shard takes at most `max_decode_rows_per_shard` sequences, so that all residents can always decode in the same step, unless the
    policy wants more residents than rows.
    """

    def __init__(self, limits: RunnerLimits, prefix_caching: bool = False) -> None:
        self._limits = limits
        each = limits.pages_per_shard // limits.num_parts
        places = [[shard * limits.num_parts + part for part in range(limits.num_parts)] for shard in range(limits.num_shards)]
        self._free_pages = [[list(range((place + 1) * each - 1, place * each - 1, -1)) for place in parts] for parts in places]
        self._free_slots = list(range(limits.num_slots))
        self._free_host_pages = list(range(limits.num_host_pages - 1, -1, -1))
        self._leaving_host_pages: list[int] = []  # read by the step that is being put together, free for the next
        self._num_sequences = [0] * limits.num_shards
        self._refs = [0] * (limits.num_shards * limits.pages_per_shard)
        shards = range(limits.num_shards if prefix_caching and limits.chunks else 0)
        self.prefixes = [PrefixCache(limits.page_size, lambda page: limits.place_of(page)[1], limits.num_parts) for _ in shards]

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody holds; those that the prefix cache remembers can be taken too."""
        return sum(sum(self._free_in(shard)) for shard in range(self._limits.num_shards))

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_free_host_pages(self) -> int:
        return len(self._free_host_pages)

    def free_pages(self, shard: int) -> int:
        """Pages of a shard that any one sequence can have: as many from every part as the fullest part has."""
        return min(self._free_in(shard)) * self._limits.num_parts

    def missing_pages(self, sequence: Sequence, num_pages: int) -> int:
        """Pages beyond those that are free, where they are wanted, that a resident sequence needs to have so many."""
        wanted = self._wanted(len(sequence.pages), num_pages)
        return sum(max(0, count - free) for count, free in zip(wanted, self._free_in(sequence.shard), strict=True))

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
        found = {shard: [] if sequence is None else self._find(sequence, shard) for shard in shards}
        fitting = [s for s, pages in found.items() if self._num_sequences[s] < most and self._fresh(s, num_pages, pages)]
        if not fitting:
            return None
        crowded = min(self._num_sequences[s] for s in fitting) + 1
        return min(
            fitting,
            key=lambda s: (self._num_sequences[s] > crowded, -len(found[s]), self._num_sequences[s], -self.free_pages(s), s),
        )

    def allocate(self, sequence: Sequence, num_pages: int, shard: int) -> int:
        """Give the sequence a slot and pages of a shard that `choose_shard` named; returns how many of them are cached already."""
        cached = self._find(sequence, shard)
        assert self._fresh(shard, num_pages, cached), f"shard {shard} has {self.free_pages(shard)} free pages, {num_pages} are asked for"
        for page in cached:
            self._refs[page] += 1
            if self.prefixes:
                self.prefixes[shard].hold(page)
        sequence.shard = shard
        sequence.slot = heapq.heappop(self._free_slots)
        sequence.set_pages(cached + [self._take(shard, index) for index in range(len(cached), num_pages)])
        self._num_sequences[shard] += 1
        return len(cached)

    def grow(self, sequence: Sequence, num_pages: int) -> bool:
        """Bring a resident sequence to so many pages; False, and nothing changed, when its shard has not enough."""
        if self.missing_pages(sequence, num_pages):
            return False
        sequence.pages.extend(self._take(sequence.shard, index) for index in range(len(sequence.pages), num_pages))
        return True

    def free(self, sequence: Sequence) -> None:
        """Take back what `allocate` and `grow` gave, and what is in host memory."""
        self._free_host_pages.extend(reversed(sequence.host_pages))
        sequence.host_pages = []
        if sequence.slot < 0:
            return
        self.remember(sequence, min(sequence.num_scheduled, len(sequence.tokens) - 1))
        for page in reversed(sequence.pages):
            self._release(page, sequence.shard)
        heapq.heappush(self._free_slots, sequence.slot)
        self._num_sequences[sequence.shard] -= 1
        sequence.shard, sequence.slot, sequence.num_readable, sequence.started_slot = -1, -1, 0, False
        sequence.set_pages([])

    def swap_out(self, sequence: Sequence) -> PageCopy | None:
        """Free what the sequence holds on the device, its written pages for as many of host memory; None when that is full."""
        used = self._limits.pages_for(sequence.num_scheduled)
        if used > len(self._free_host_pages):
            return None
        host_pages = [self._free_host_pages.pop() for _ in range(used)]
        copy = PageCopy(tuple(sequence.pages[:used]), tuple(host_pages), sequence.shard)
        sequence.home = sequence.shard
        self.free(sequence)
        sequence.host_pages = host_pages
        return copy

    def swap_in(self, sequence: Sequence, num_pages: int) -> PageCopy:
        """The way back, home, where `choose_shard` has found room. The host's pages are free once the step has been put together."""
        host_pages, sequence.host_pages = sequence.host_pages, []
        self.allocate(sequence, num_pages, sequence.home)
        self._leaving_host_pages += reversed(host_pages)
        return PageCopy(tuple(sequence.pages[: len(host_pages)]), tuple(host_pages), sequence.shard)

    def step_is_built(self) -> None:
        """What the step reads from host memory may be overwritten by the next one."""
        self._free_host_pages += self._leaving_host_pages
        self._leaving_host_pages = []

    def remember(self, sequence: Sequence, num_positions: int) -> None:
        """Let later steps find the full pages of these positions, which have been written by the steps scheduled so far."""
        if self.prefixes:
            self.prefixes[sequence.shard].remember(sequence, num_positions)

    def forget_prefixes(self) -> None:
        """The pages were lost."""
        for shard, cache in enumerate(self.prefixes):
            self._take_back(shard, cache.clear())

    def forget(self, sequence: Sequence) -> None:
        """What this sequence, which has ended, wrote shall not be found any more."""
        for shard, cache in enumerate(self.prefixes):
            self._take_back(shard, cache.forget(sequence))

    def _take_back(self, shard: int, pages: Iterable[int]) -> None:
        """Pages of a shard that nobody holds or remembers are free."""
        for page in pages:
            self._free_pages[shard][self._limits.place_of(page)[1]].append(page)

    def check(self, residents: Iterable[Sequence], swapped: Iterable[Sequence] = ()) -> None:
        """Assert conservation: every page is free or held as often as it has references, every slot free or held by one resident, and
        pages are on their shard and in their part."""
        residents = list(residents)
        held = Counter(page for sequence in residents for page in sequence.pages)
        idle = [page for cache in self.prefixes for part in cache.idle for page in part]
        free = [page for parts in self._free_pages for part in parts for page in part] + idle
        per_shard = self._limits.pages_per_shard
        assert sorted([*free, *held]) == list(range(self._limits.num_shards * per_shard)), "pages are lost or held twice"
        assert all(self._refs[page] == held[page] for page in range(len(self._refs))), "references and holders differ"
        self._check_shared({page for page, count in held.items() if count > 1}, residents)
        slots = self._free_slots + [sequence.slot for sequence in residents]
        assert sorted(slots) == list(range(self._limits.num_slots)), "slots are lost or held twice"
        host = self._free_host_pages + self._leaving_host_pages + [page for sequence in swapped for page in sequence.host_pages]
        assert sorted(host) == list(range(self._limits.num_host_pages)), "pages of host memory are lost or held twice"
        for shard, parts in enumerate(self._free_pages):
            here = [sequence for sequence in residents if sequence.shard == shard]
            assert self._num_sequences[shard] == len(here), f"shard {shard} counts {self._num_sequences[shard]} sequences, {len(here)} live"
            placed = [(page, part) for part, pages in enumerate(parts) for page in pages]
            placed += [(page, index % len(parts)) for sequence in here for index, page in enumerate(sequence.pages)]
            assert all(self._limits.place_of(page) == (shard, part) for page, part in placed), f"shard {shard} has pages of another place"

    def _find(self, sequence: Sequence, shard: int) -> list[int]:
        """Pages of the sequence's beginning that are there already: cached ones, or those of another sample of its request.

        One token at least is left to compute: the one whose successor is wanted; all are where log-probabilities of the prompt are.
        """
        if sequence.num_scheduled or sequence.scoring:
            return []
        most = (len(sequence.tokens) - 1) // self._limits.page_size
        cached = self.prefixes[shard].find(sequence, most) if self.prefixes else []
        for other in sequence.family:
            readable = min(other.num_readable, sequence.shared_len) // self._limits.page_size
            if other.shard == shard and readable > len(cached):
                cached = other.pages[: min(readable, most)]
        return cached

    def _check_shared(self, pages: set[int], residents: list[Sequence]) -> None:
        """Assert that a page with several holders stands at one place and holds the same tokens after the same tokens for all of them."""
        held: dict[int, tuple[int, list[int]]] = {}
        for sequence in residents if pages else ():
            for index, page in enumerate(sequence.pages):
                if page in pages:
                    content = index, sequence.tokens[: (index + 1) * self._limits.page_size]
                    assert len(content[1]) == (index + 1) * self._limits.page_size, f"page {page} is shared and not full"
                    assert held.setdefault(page, content) == content, f"page {page} is shared by sequences that differ"

    def _fresh(self, shard: int, num_pages: int, cached: list[int]) -> bool:
        """Whether the shard has pages for what is not cached; cached ones that nobody holds count as free until they are taken."""
        free, wanted = self._free_in(shard), self._wanted(len(cached), num_pages)
        for index, page in enumerate(cached):
            free[index % len(free)] -= self._refs[page] == 0
        return all(map(le, wanted, free))

    def _free_in(self, shard: int) -> list[int]:
        """Pages that nobody holds, per part of a shard."""
        free = list(map(len, self._free_pages[shard]))
        return list(map(add, free, map(len, self.prefixes[shard].idle))) if self.prefixes else free

    def _wanted(self, first: int, end: int) -> list[int]:
        """How many of the pages from `first` to before `end` of a sequence lie in each part."""
        parts = self._limits.num_parts
        return [max(0, ceil_div(end - part, parts)) - max(0, ceil_div(first - part, parts)) if end > first else 0 for part in range(parts)]

    def _take(self, shard: int, index: int) -> int:
        """A free page for this place in a sequence."""
        part = index % self._limits.num_parts
        free = self._free_pages[shard][part]
        page = free.pop() if free else self.prefixes[shard].evict(part)
        self._refs[page] = 1
        return page

    def _release(self, page: int, shard: int) -> None:
        self._refs[page] -= 1
        if not self._refs[page] and not (self.prefixes and self.prefixes[shard].idles(page)):
            self._free_pages[shard][self._limits.place_of(page)[1]].append(page)
