"""Orca's scheduler (OSDI 2022, Algorithm 1): iteration by iteration in order of arrival, with pages reserved for the longest answer."""

from __future__ import annotations

from dataclasses import dataclass

from partinf.engine.batch import BatchBuilder


@dataclass(frozen=True)
class Orca:
    """At most `max_batch_size` sequences per iteration, the oldest first among those that are in no other batch in flight.

    In its first iteration a sequence reserves pages for prompt and longest answer together, once, so an admitted sequence can run to
    its end. If they are not free the search stops: none is skipped. How many batches are in flight (n_workers) is the engine's `lag`
    plus one, which fills the pipeline stages of the runner.
    """

    max_batch_size: int | None = None

    def schedule(self, batch: BatchBuilder) -> None:
        most = self.max_batch_size or batch.limits.num_slots
        room = True
        for sequence in batch.running:
            if batch.num_rows == most:
                return
            room = batch.run(sequence) and room
        while room and batch.num_rows < most:
            oldest = batch.oldest_waiting
            room = oldest is not None and batch.start(oldest, reserve=True)
