"""First come, first served with pages on demand: the newest running sequence gives its pages up when they run out (as vLLM does)."""

from __future__ import annotations

from dataclasses import dataclass

from partinf.engine.batch import BatchBuilder
from partinf.engine.request import Sequence, Status


@dataclass(frozen=True)
class FirstComeFirstServed:
    """Every resident sequence runs in every iteration; then prompts join in order of arrival while they fit.

    The first one that does not fit ends the search: no sequence overtakes another. If a arrived before b, a has therefore run at
    least as many iterations as b as long as both live, provided that prompts run whole and neither was preempted. Pages are given out as
    they are needed; when there are none for a sequence, the newest on its shard waits again, and none is admitted in that iteration.

    Attributes:
        max_batch_size: sequences per iteration, and so many may be resident per pipeline stage; None leaves it to the runner's limits.
        chunk_prefills: cut prompts so that every step's prefill tokens are used up; otherwise only those longer than a step are cut.
    """

    max_batch_size: int | None = None
    chunk_prefills: bool = False

    def schedule(self, batch: BatchBuilder) -> None:
        room, preempted = True, False
        running = sorted(batch.running, key=_arrival)
        most = batch.most_rows(self.max_batch_size)
        residents = (self.max_batch_size or batch.limits.num_slots) * batch.limits.num_stages
        for index, sequence in enumerate(running):
            if batch.num_rows == most:
                return
            if sequence.status is not Status.RUNNING or batch.run(sequence, chunked=self.chunk_prefills):
                continue
            if not batch.missing_pages(sequence):
                room = False  # the step is full
            elif _make_room(batch, sequence, running[index:]):
                preempted = True
                batch.run(sequence, chunked=self.chunk_prefills)
            else:
                preempted = True
        while room and not preempted and batch.num_rows < most and batch.num_resident < residents:
            oldest = batch.oldest_waiting
            room = oldest is not None and batch.start(oldest, chunked=self.chunk_prefills)


def _make_room(batch: BatchBuilder, sequence: Sequence, running: list[Sequence]) -> bool:
    """Preempt the newest of `running` on the shard until there is a page for the sequence; whether it is not itself the newest."""
    for victim in reversed(running):
        if victim.status is Status.RUNNING and victim.shard == sequence.shard:
            batch.preempt(victim)
            if victim is sequence or not batch.missing_pages(sequence):
                return victim is not sequence
    return False


def _arrival(sequence: Sequence) -> int:
    return sequence.request.number
