"""Request-level scheduling, the baseline of iteration-level scheduling: a batch is formed once and runs until its last member is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from partinf.engine.batch import BatchBuilder


@dataclass(frozen=True)
class RequestLevel:
    """Static batches of at most `batch_size` sequences, in order of arrival; nobody joins before all of a batch are done."""

    batch_size: int

    def schedule(self, batch: BatchBuilder) -> None:
        if batch.num_resident == 0:
            for sequence in batch.waiting[: self.batch_size]:
                if not batch.admit(sequence):
                    break
        for sequence in batch.running:
            batch.run(sequence)


def request_level_iterations(generated_lens: Iterable[int], batch_size: int) -> int:
    """Iterations that static batches take for requests which generate so many tokens each, all waiting, in this order.

    A batch takes as many iterations as its longest member generates tokens (the first of them by the prefill), provided that its
    prompts are prefilled in one iteration; if not, request-level scheduling takes longer than this.
    """
    lens = list(generated_lens)
    return sum(max(lens[first : first + batch_size]) for first in range(0, len(lens), batch_size))
