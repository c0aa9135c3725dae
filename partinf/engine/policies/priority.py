"""Priorities that the requests name: the lowest number first, then the order of arrival. A better one preempts a worse one."""

from __future__ import annotations

from partinf.engine.policies.ranked import Pages, Ranked
from partinf.engine.request import Sequence


def by_priority(max_batch_size: int | None = None, pages: Pages | None = None) -> Ranked:
    """Rank by `SamplingParams.priority`, then by arrival."""

    def rank(sequence: Sequence) -> tuple[float, ...]:
        return sequence.request.params.priority, sequence.request.number

    return Ranked(rank, "priority", max_batch_size, pages or Pages())
