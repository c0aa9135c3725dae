"""The sequences of an engine: which wait, are resident, or have their pages in host memory, and their moves between these places.

A move takes the pages along, and is counted. A policy says which is to move, through the `BatchBuilder`.
"""

from __future__ import annotations

from collections import OrderedDict

from partinf.engine.metrics import Metrics
from partinf.engine.pages import PagePool
from partinf.engine.request import Sequence, Status
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import PageCopy


class Roster:
    """Sequences by `Request.number`.

    Attributes:
        waiting: in order of arrival. running: residents, in order of admission. swapped: with their pages in host memory.
        num_steps: built so far.
    """

    def __init__(self, limits: RunnerLimits, metrics: Metrics | None = None, prefix_caching: bool = False) -> None:
        self.limits = limits
        self.metrics = metrics or Metrics(limits.num_slots)
        self.pool = PagePool(limits, prefix_caching)
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.running: dict[int, Sequence] = {}
        self.swapped: dict[int, Sequence] = {}
        self.num_steps = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting[sequence.request.number] = sequence

    def admit(self, sequence: Sequence, shard: int, num_pages: int) -> None:
        """Make a waiting sequence resident, with so many pages of a shard. What the prefix cache has of it need not be computed."""
        sequence.prefill_len = len(sequence.tokens)
        num_cached = self.pool.allocate(sequence, num_pages, shard) * self.limits.page_size
        sequence.num_scheduled = num_cached
        self.metrics.cached_tokens += num_cached
        if not sequence.num_preemptions:
            sequence.num_cached = num_cached
        del self.waiting[sequence.request.number]
        self.running[sequence.request.number] = sequence
        sequence.status = Status.RUNNING

    def preempt(self, sequence: Sequence) -> None:
        """Take a resident's slot and pages and let it wait in its place among the others."""
        number = sequence.request.number
        self.pool.free(sequence)
        del self.running[number]
        self.metrics.preemptions += 1
        self.metrics.recomputed_tokens += sequence.num_scheduled
        sequence.num_preemptions += 1
        sequence.num_scheduled = 0
        sequence.status = Status.WAITING
        behind_another = bool(self.waiting) and next(iter(self.waiting)) < number
        self.waiting[number] = sequence
        if behind_another:
            self.waiting = OrderedDict(sorted(self.waiting.items()))
        else:
            self.waiting.move_to_end(number, last=False)

    def swap_out(self, sequence: Sequence) -> tuple[PageCopy, ...] | None:
        """Take a resident's slot and move its pages to host memory; None when that is full."""
        copies = self.pool.swap_out(sequence)
        if copies is None:
            return None
        del self.running[sequence.request.number]
        self.swapped[sequence.request.number] = sequence
        self.metrics.swapped_out_pages += sum(len(copy.pages) for copy in copies)
        self.metrics.swap_outs += 1
        sequence.num_preemptions += 1
        sequence.status = Status.SWAPPED
        return copies

    def swap_in(self, sequence: Sequence, num_pages: int) -> tuple[PageCopy, ...]:
        """Make a swapped sequence resident again, on its home shard, which has so many pages."""
        copies = self.pool.swap_in(sequence, num_pages)
        del self.swapped[sequence.request.number]
        self.running[sequence.request.number] = sequence
        self.metrics.swapped_in_pages += sum(len(copy.pages) for copy in copies)
        sequence.status = Status.RUNNING
        return copies

    def finish(self, sequence: Sequence, status: Status = Status.FINISHED) -> None:
        """Let a sequence go, wherever it is, and free what it held."""
        for place in (self.waiting, self.running, self.swapped):
            if place.pop(sequence.request.number, None) is not None:
                self.pool.free(sequence)
        sequence.status = status

    def check(self) -> None:
        """Assert that pages and slots are conserved."""
        self.pool.check(self.running.values(), self.swapped.values())
