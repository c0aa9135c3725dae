"""The prefix cache of one shard and one group: which full pages hold which tokens after which tokens.

A page is named by a hash chain over (name of the page before, its tokens), so equal names mean equal contexts from the first token on.
Pages that no sequence holds stay findable until they are needed, and are reused least recently released first; of one sequence the last
page goes first, because without the pages before it a page cannot be found.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable

from partinf.engine.request import HeldPages, Sequence


class PrefixCache:
    """Names of pages, both ways, and the idle ones in the order in which they were let go.

    Attributes:
        idle: pages that no sequence holds, per sequence shard.
    """

    def __init__(self, page_size: int, sequence_shard_of: Callable[[int], int] = lambda page: 0, num_sequence_shards: int = 1) -> None:
        """
        Args:
            sequence_shard_of: the sequence shard of a page; a page is needed in a certain one.
        """
        self._page_size = page_size
        self._sequence_shard_of = sequence_shard_of
        self._by_digest: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self.idle: list[dict[int, None]] = [{} for _ in range(num_sequence_shards)]

    def find(self, sequence: Sequence, most: int) -> list[int]:
        """The cached pages of the sequence's first tokens, in order, at most so many."""
        self._name(sequence, most)
        pages = []
        for digest in sequence.digests[:most]:
            page = self._by_digest.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def find_each(self, sequence: Sequence, most: int) -> list[int | None]:
        """The same, though pages before one are not there; None for those."""
        self._name(sequence, most)
        return [self._by_digest.get(digest) for digest in sequence.digests[:most]]

    def remember(self, sequence: Sequence, held: HeldPages, num_positions: int) -> None:
        """Make those of the pages held that are full of the first positions findable, unless others with the same tokens are."""
        full = num_positions // self._page_size
        self._name(sequence, full)
        for page, digest in zip(held.pages, sequence.digests[held.first : full], strict=False):
            if digest not in self._by_digest and page not in self._digest_of:
                self._by_digest[digest] = page
                self._digest_of[page] = digest

    def hold(self, page: int) -> None:
        """A sequence holds this page."""
        self.idle[self._sequence_shard_of(page)].pop(page, None)

    def idles(self, page: int) -> bool:
        """No sequence holds this page any more; returns whether it stays cached."""
        if page in self._digest_of:
            self.idle[self._sequence_shard_of(page)][page] = None
        return page in self._digest_of

    def evict(self, sequence_shard: int) -> int:
        """Forget the page of a sequence shard that has been idle longest, and return it."""
        page = next(iter(self.idle[sequence_shard]))
        del self.idle[sequence_shard][page]
        del self._by_digest[self._digest_of.pop(page)]
        return page

    def forget(self, sequence: Sequence) -> list[int]:
        """Let the pages of a sequence's tokens be found no more; returns those of them that were idle."""
        pages = [self._by_digest.pop(digest) for digest in sequence.digests if digest in self._by_digest]
        idle = [page for page in pages if page in self.idle[self._sequence_shard_of(page)]]
        for page in pages:
            del self._digest_of[page]
            self.hold(page)
        return idle

    def clear(self) -> list[int]:
        """Forget everything, and return the pages that were idle."""
        idle = [page for pages in self.idle for page in pages]
        for pages in self.idle:
            pages.clear()
        self._by_digest.clear()
        self._digest_of.clear()
        return idle

    def _name(self, sequence: Sequence, num_pages: int) -> None:
        """Make the digests of the sequence's first pages."""
        digests, size = sequence.digests, self._page_size
        for index in range(len(digests), num_pages):
            tokens = array("I", sequence.tokens[index * size : (index + 1) * size]).tobytes()
            digests.append(hashlib.blake2b((digests[-1] if digests else b"") + tokens, digest_size=16).digest())
