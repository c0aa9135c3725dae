"""The page pool: who owns which page of the KV cache. It counts pages; what they hold is the runner's.

Pages belong to the shards of the decode batch axes, `pages_per_shard` each, and all pages of a sequence lie on one shard. Slots, the
lanes in which the runner keeps each resident sequence's last token, are one range for all shards.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from partinf.engine.request import Sequence
from partinf.engine.runner import RunnerLimits


class PagePool:
    """Free pages per shard and free slots.

    A shard takes at most `max_decode_rows_per_shard` sequences, so that all residents can always decode in the same step.
    """

    def __init__(self, limits: RunnerLimits) -> None:
        self._limits = limits
        first = range(0, limits.num_shards * limits.pages_per_shard, limits.pages_per_shard)
        self._free_pages = [list(range(low + limits.pages_per_shard - 1, low - 1, -1)) for low in first]
        self._free_slots = list(range(limits.num_slots))
        self._num_sequences = [0] * limits.num_shards

    @property
    def num_free_pages(self) -> int:
        return sum(map(len, self._free_pages))

    def choose_shard(self, num_pages: int, shards: Iterable[int]) -> int | None:
        """The shard that takes another sequence of so many pages: fewest sequences, then most free pages, then the first.

        A decode step is padded to the fullest shard, hence sequences before pages. None when no shard of `shards` has room.
        """
        if not self._free_slots:
            return None
        most = self._limits.max_decode_rows_per_shard
        fitting = [s for s in shards if self._num_sequences[s] < most and len(self._free_pages[s]) >= num_pages]
        return min(fitting, key=lambda s: (self._num_sequences[s], -len(self._free_pages[s]), s), default=None)

    def allocate(self, sequence: Sequence, num_pages: int, shard: int) -> None:
        """Give the sequence a slot and pages of a shard that `choose_shard` named."""
        free = self._free_pages[shard]
        assert len(free) >= num_pages, f"shard {shard} has {len(free)} free pages, {num_pages} are asked for"
        sequence.shard = shard
        sequence.slot = heapq.heappop(self._free_slots)
        sequence.pages = [free.pop() for _ in range(num_pages)]
        self._num_sequences[shard] += 1

    def free(self, sequence: Sequence) -> None:
        """Take back what `allocate` gave."""
        self._free_pages[sequence.shard].extend(reversed(sequence.pages))
        heapq.heappush(self._free_slots, sequence.slot)
        self._num_sequences[sequence.shard] -= 1
        sequence.shard, sequence.slot, sequence.pages = -1, -1, []

    def check(self, residents: Iterable[Sequence]) -> None:
        """Assert conservation: every page and slot is either free or held by exactly one resident, and pages are on their shard."""
        residents = list(residents)
        pages = [page for free in self._free_pages for page in free] + [page for sequence in residents for page in sequence.pages]
        slots = self._free_slots + [sequence.slot for sequence in residents]
        per_shard = self._limits.pages_per_shard
        assert sorted(pages) == list(range(self._limits.num_shards * per_shard)), "pages are lost or held twice"
        assert sorted(slots) == list(range(self._limits.num_slots)), "slots are lost or held twice"
        for shard, free in enumerate(self._free_pages):
            held = [sequence for sequence in residents if sequence.shard == shard]
            assert self._num_sequences[shard] == len(held), f"shard {shard} counts {self._num_sequences[shard]} sequences, {len(held)} live"
            on_shard = free + [page for sequence in held for page in sequence.pages]
            assert all(page // per_shard == shard for page in on_shard), f"shard {shard} holds pages of another shard"
