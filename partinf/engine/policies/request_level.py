"""Request-level scheduling, the baseline of iteration-level scheduling: a batch is formed once and runs until its last member is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from partinf.engine.batch import BatchBuilder
from partinf.engine.request import Sequence


@dataclass
class RequestLevel:
    """Static batches of at most `batch_size` sequences, in order of arrival; no sequence joins and none is returned before all are done.

    Prompts are padded to the longest of the batch, and the lanes of those that have ended run on as padding.

    Attributes:
        shortest_prefill: what FasterTransformer does instead of padding prompts: all are prefilled up to the length of the shortest, the
            rest of the longer ones is fed token by token.
    """

    batch_size: int
    shortest_prefill: bool = False
    returns_whole_batches: bool = True
    _shortest: int = field(default=0, init=False, repr=False)
    _longest: int = field(default=0, init=False, repr=False)
    _size: int = field(default=0, init=False, repr=False)

    def schedule(self, batch: BatchBuilder) -> None:
        if batch.num_resident == 0:
            self._form(batch)
        # One batch, one iteration at a time: even known tokens wait until what is in a pipeline has come out.
        running = [sequence for sequence in batch.running if batch.limits.num_stages == 1 or not sequence.in_flight]
        if not running:
            return
        prefilling = [sequence for sequence in running if not sequence.num_scheduled]
        for sequence in running:
            self._run(batch, sequence)
        lanes = max(0, self._size - batch.num_rows)
        if prefilling and not self.shortest_prefill:
            batch.pad(0, sum(max(0, self._longest - sequence.prefill_len) for sequence in prefilling if batch.taken(sequence)))
        elif batch.num_resident == len(running):
            batch.pad(lanes, 0)

    def _form(self, batch: BatchBuilder) -> None:
        members = []
        for sequence in batch.waiting[: self.batch_size]:
            if not batch.admit(sequence, reserve=True):
                break
            members.append(sequence.prefill_len)
        self._size = len(members)
        self._shortest, self._longest = min(members, default=0), max(members, default=0)

    def _run(self, batch: BatchBuilder, sequence: Sequence) -> None:
        if not self.shortest_prefill:
            batch.run(sequence)
        elif sequence.num_scheduled < self._shortest:
            batch.run(sequence, at_most=self._shortest - sequence.num_scheduled)
        else:
            batch.run_token(sequence)


def request_level_iterations(generated_lens: Iterable[int], batch_size: int) -> int:
    """Iterations that static batches take for requests which generate so many tokens each, all waiting, in this order.

    A batch takes as many iterations as its longest member generates tokens (the first of them by the prefill), provided that its
    prompts are prefilled in one iteration; if not, request-level scheduling takes longer than this.
    """
    lens = list(generated_lens)
    return sum(max(lens[first : first + batch_size]) for first in range(0, len(lens), batch_size))
