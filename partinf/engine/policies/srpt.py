"""Shortest remaining processing time first, an oracle: it reads how long an answer will be, which no server knows."""

from __future__ import annotations

from partinf.engine.estimates import Estimates
from partinf.engine.policies.ranked import Pages, Ranked
from partinf.engine.request import Sequence


def shortest_remaining_first(estimates: Estimates, max_batch_size: int | None = None, pages: Pages | None = None) -> Ranked:
    """Rank by the time that is left: prefill if it has not run, and one decode iteration per token that is still to come."""

    def remaining(sequence: Sequence) -> tuple[float, ...]:
        left = sequence.request.max_tokens - sequence.num_generated
        seconds = left * estimates.decode
        if not sequence.num_scheduled:
            seconds += estimates.first_iteration(len(sequence.tokens)) - estimates.decode
        return seconds, sequence.request.number

    return Ranked(remaining, "srpt", max_batch_size, pages or Pages())
