"""Iteration-level scheduling, first come, first served (Orca, Algorithm 1, one batch in flight)."""

from __future__ import annotations

from dataclasses import dataclass

from partinf.engine.batch import BatchBuilder


@dataclass(frozen=True)
class FirstComeFirstServed:
    """Every resident sequence runs in every iteration; then prompts join in order of arrival while they fit.

    The first one that does not fit ends the search: nobody overtakes. If a arrived before b, a has therefore run at least as many
    iterations as b as long as both live, provided that prompts run whole.

    Attributes:
        max_batch_size: sequences that may be resident; None leaves it to the runner's limits.
        chunk_prefills: cut prompts so that every step's prefill tokens are used up; otherwise only those longer than a step are cut.
    """

    max_batch_size: int | None = None
    chunk_prefills: bool = False

    def schedule(self, batch: BatchBuilder) -> None:
        room = True
        for sequence in batch.running:
            room = batch.run(sequence, chunked=self.chunk_prefills) and room
        while room and (self.max_batch_size is None or batch.num_resident < self.max_batch_size):
            oldest = batch.oldest_waiting
            room = oldest is not None and batch.start(oldest, chunked=self.chunk_prefills)
