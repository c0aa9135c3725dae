"""The pages of one group of the cache: which are free, which sequences may have them, and which hold what the prefix cache remembers.

The group that keeps all positions gives a sequence more pages as it grows, until there are none. A group of windows keeps for every
sequence on a shard as many as its window can ever take between two steps, and in addition what the prompts of one step take more while
they are computed: so it never has too few for a sequence that runs, and a policy has nothing to decide about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from operator import add, le

from partinf.engine.prefix_cache import PrefixCache
from partinf.engine.request import HeldPages, Sequence
from partinf.engine.runner import RunnerLimits
from partinf.foundation.paging import first_page
from partinf.foundation.rounding import ceil_div


class GroupPool:
    """Free pages per sequence shard of every shard, references to the others, and free pages of host memory.

    Attributes:
        window: as in `PageGroup`. num_pages: of all shards. refs: holders of every page. prefixes: per shard, where prefix caching is on.
        reserved: per shard, pages per sequence shard that are reserved for its sequences, in a group of windows.
        free_host_pages: of host memory. leaving_host_pages: that the step reads which is being put together; free for the next.
    """

    def __init__(self, index: int, limits: RunnerLimits, prefix_caching: bool) -> None:
        group, ways, shards = limits.groups[index], limits.num_sequence_shards, limits.num_shards
        self.window, self.num_pages = group.window, group.pages_per_shard * shards
        self.prefixes = [
            PrefixCache(limits.page_size, lambda page: limits.place_of(page, index)[1], ways)
            for _ in range(shards if prefix_caching else 0)
        ]
        self.reserved = [0] * shards
        self.refs = [0] * self.num_pages
        self._index, self._limits, self._ways = index, limits, ways
        self._each = group.pages_per_shard // ways
        self._most_reserved = self._each - limits.chunk_pages
        places = [[shard * ways + place for place in range(ways)] for shard in range(shards)]
        self._free = [[list(range((place + 1) * self._each - 1, place * self._each - 1, -1)) for place in of_shard] for of_shard in places]
        self.free_host_pages = list(range(group.num_host_pages - 1, -1, -1))
        self.leaving_host_pages: list[int] = []

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds; those that the prefix cache remembers can be taken too."""
        return sum(sum(self.free_in(shard)) for shard in range(len(self._free)))

    @property
    def num_available(self) -> int:
        """Pages that sequences may still be given: those in no use or, for windows, those reserved for no sequence."""
        return sum(map(self.available, range(len(self._free)))) if self.window else self.num_free

    def available(self, shard: int) -> int:
        """Pages of a shard that any one sequence can have: as many from each sequence shard as the fullest has, or as are unreserved."""
        each = self._most_reserved - self.reserved[shard] if self.window else min(self.free_in(shard))
        return each * self._ways

    def free_in(self, shard: int) -> list[int]:
        """Pages that no sequence holds, per sequence shard of a shard."""
        free = list(map(len, self._free[shard]))
        return list(map(add, free, map(len, self.prefixes[shard].idle))) if self.prefixes else free

    def missing(self, held: HeldPages, end: int, shard: int) -> int:
        """Pages beyond those that are free, where they are wanted, that a resident needs to reach to its page `end`; windows lack none."""
        return sum(max(0, count - free) for count, free in zip(self._wanted(held.end, end), self.free_in(shard), strict=True))

    def has_room(self, sequence: Sequence | None, end: int, shard: int, cached: list[int]) -> bool:
        """Whether a shard takes one more sequence with its pages up to `end`, the first of which are cached: those of them that no sequence
        holds count as free until they are taken."""
        if self.window:
            return sequence is None or self.reserved[shard] + self._reserve(sequence) <= self._most_reserved
        free, wanted = self.free_in(shard), self._wanted(len(cached), end)
        for index, page in enumerate(cached):
            free[index % self._ways] -= self.refs[page] == 0
        return all(map(le, wanted, free))

    def admit(self, sequence: Sequence, end: int, shard: int, num_cached: int, cached: list[int]) -> None:
        """Give a sequence the cached ones of its first `num_cached` pages, and in a group that keeps all positions all up to `end`."""
        held = sequence.held[self._index]
        for page in cached:
            self.refs[page] += 1
            if self.prefixes:
                self.prefixes[shard].hold(page)
        held.pages = cached
        if self.window:
            held.reserved = self._reserve(sequence)
            self.reserved[shard] += held.reserved
            if not sequence.num_scheduled:
                held.first = num_cached - len(cached)
        else:
            self.extend(held, end, shard)

    def extend(self, held: HeldPages, end: int, shard: int) -> None:
        """Give a resident its pages up to `end`."""
        for index in range(held.end, end):
            held.pages.append(self._take(shard, index))

    def trim(self, sequence: Sequence) -> None:
        """Let go what no later query of a resident sees, once its step has been put together.

        That step and others in flight may still read it. A step that writes the page for another sequence comes after them, on the devices
        and in every stage of a pipeline, which keep steps in order; so nothing waits for them. One page more stays (`window_pages`).
        """
        held, size = sequence.held[self._index], self._limits.page_size
        passed = first_page(sequence.num_scheduled - size, self.window, size) - held.first
        if passed > 0:
            for page in held.pages[:passed]:
                self._release(page, sequence.shard)
            del held.pages[:passed]
            held.first += passed
            sequence.pages_changed()

    def release(self, sequence: Sequence) -> None:
        """Take back all that a resident holds."""
        held = sequence.held[self._index]
        for page in reversed(held.pages):
            self._release(page, sequence.shard)
        self.reserved[sequence.shard] -= held.reserved
        held.first, held.pages, held.reserved = 0, [], 0

    def take_back(self, shard: int, pages: list[int]) -> None:
        """Pages of a shard are free if no sequence holds them and the prefix cache does not remember them."""
        for page in pages:
            self._free[shard][self._limits.place_of(page, self._index)[1]].append(page)

    def check(self, residents: list[Sequence], swapped: Iterable[Sequence]) -> None:
        """Assert conservation: every page is free or held as often as it has references, pages are on their shard and sequence shard, and a
        window holds no more than is reserved for it."""
        held = {sequence.request.number: sequence.held[self._index] for sequence in residents}
        count = Counter(page for one in held.values() for page in one.pages)
        idle = [page for cache in self.prefixes for pages in cache.idle for page in pages]
        free = [page for of_shard in self._free for pages in of_shard for page in pages]
        assert sorted([*free, *idle, *count]) == list(range(self.num_pages)), "pages are lost or held twice"
        assert all(self.refs[page] == count[page] for page in range(self.num_pages)), "references and holders differ"
        self._check_shared({page for page, holders in count.items() if holders > 1}, residents)
        gone = [page for sequence in swapped for page in sequence.held[self._index].host_pages]
        host = self.free_host_pages + self.leaving_host_pages + gone
        assert sorted(host) == list(range(self._limits.groups[self._index].num_host_pages)), "pages of host memory are lost or held twice"
        for shard, of_shard in enumerate(self._free):
            here = [one for sequence in residents if sequence.shard == shard for one in [held[sequence.request.number]]]
            placed = [(page, place) for place, pages in enumerate(of_shard) for page in pages]
            placed += [(page, (one.first + index) % self._ways) for one in here for index, page in enumerate(one.pages)]
            right = all(self._limits.place_of(page, self._index) == (shard, place) for page, place in placed)
            assert right, f"shard {shard} has pages of another place"
            assert self.reserved[shard] == sum(one.reserved for one in here) <= max(0, self._most_reserved), f"shard {shard} keeps too many"
            if self.window:
                assert all(ceil_div(len(one.pages), self._ways) <= one.reserved for one in here), "a window has more than is kept for it"

    def _check_shared(self, pages: set[int], residents: list[Sequence]) -> None:
        """Assert that a page with several holders stands at one place and holds the same tokens after the same tokens for all of them."""
        seen: dict[int, tuple[int, list[int]]] = {}
        for sequence in residents if pages else ():
            held = sequence.held[self._index]
            for index, page in enumerate(held.pages, start=held.first):
                if page in pages:
                    content = index, sequence.tokens[: (index + 1) * self._limits.page_size]
                    assert len(content[1]) == (index + 1) * self._limits.page_size, f"page {page} is shared and not full"
                    assert seen.setdefault(page, content) == content, f"page {page} is shared by sequences that differ"

    def _reserve(self, sequence: Sequence) -> int:
        return self._limits.reserved_pages(self.window, sequence.max_positions)

    def _wanted(self, first: int, end: int) -> list[int]:
        """How many of the pages from `first` to before `end` of a sequence lie in each sequence shard."""
        ways = self._ways
        return [max(0, ceil_div(end - place, ways)) - max(0, ceil_div(first - place, ways)) if end > first else 0 for place in range(ways)]

    def _take(self, shard: int, index: int) -> int:
        """A free page for this place in a sequence."""
        place = index % self._ways
        free = self._free[shard][place]
        page = free.pop() if free else self.prefixes[shard].evict(place)
        self.refs[page] = 1
        return page

    def _release(self, page: int, shard: int) -> None:
        self.refs[page] -= 1
        if not self.refs[page] and not (self.prefixes and self.prefixes[shard].idles(page)):
            self._free[shard][self._limits.place_of(page, self._index)[1]].append(page)
