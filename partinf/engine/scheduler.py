"""The scheduler: which sequences take part in the next iteration, and the `Step` that says so to the runner.

Iteration-level scheduling (Orca, section 3.2): a new step is put together for every iteration, so that sequences join and leave
between any two. Decode rows and prefill chunks of any sequences share a step (selective batching, section 3.3). A `Policy` says who
runs, in one method; what a step can hold, slots, pages and positions are settled here, once for all policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from partinf.engine.pages import PagePool
from partinf.engine.request import Sequence, Status
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import DecodeRow, PrefillChunk, Step


@dataclass(frozen=True)
class Batch:
    """A step and the sequences behind its rows, in the same order."""

    step: Step
    decode: tuple[Sequence, ...]
    prefill: tuple[Sequence, ...]

    @property
    def num_sequences(self) -> int:
        return len(self.decode) + len(self.prefill)


class Policy(Protocol):
    """Who runs in the next iteration."""

    def schedule(self, batch: BatchBuilder) -> None:
        """Fill `batch` by calling its `run`, `start` and `admit`. It must run something whenever nothing else is in flight."""
        ...


class Scheduler:
    """Owns the sequences that wait and those that are resident."""

    def __init__(self, limits: RunnerLimits, policy: Policy) -> None:
        self.limits = limits
        self.policy = policy
        self.pool = PagePool(limits)
        self.waiting: dict[int, Sequence] = {}  # by Request.number, in order of arrival
        self.running: dict[int, Sequence] = {}  # the same, in order of admission

    def add(self, sequence: Sequence) -> None:
        self.waiting[sequence.request.number] = sequence

    def schedule(self) -> Batch | None:
        """The next iteration; None when no sequence can run. Positions and iteration counts of those that run move on."""
        builder = BatchBuilder(self)
        self.policy.schedule(builder)
        return builder.build()

    def admit(self, sequence: Sequence, shard: int) -> None:
        """Make a waiting sequence resident, with all pages that it can ever need.

        Orca's Algorithm 1 reserves likewise at the first iteration: whoever has been admitted can run to its end, so no two sequences
        ever wait for each other's pages.
        """
        self.pool.allocate(sequence, self.pages_needed(sequence), shard)
        del self.waiting[sequence.request.number]
        self.running[sequence.request.number] = sequence
        sequence.status = Status.RUNNING
        sequence.prefill_len = len(sequence.tokens)

    def finish(self, sequence: Sequence) -> None:
        """Let a sequence go, resident or not, and free what it held."""
        if self.waiting.pop(sequence.request.number, None) is None:
            del self.running[sequence.request.number]
            self.pool.free(sequence)
        sequence.status = Status.FINISHED

    def pages_needed(self, sequence: Sequence) -> int:
        return self.limits.pages_for(sequence.request.max_positions)

    def check(self) -> None:
        """Assert that pages and slots are conserved."""
        self.pool.check(self.running.values())


class BatchBuilder:
    """One iteration while a policy puts it together.

    `run` gives a resident sequence its next token or chunk; `admit` makes a waiting one resident; `start` does both or neither.
    Each says whether there was room.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        limits = scheduler.limits
        self._scheduler = scheduler
        self._limits = limits
        self._decode: list[tuple[Sequence, DecodeRow]] = []
        self._prefill: list[tuple[Sequence, PrefillChunk]] = []
        self._prefill_tokens = [limits.max_prefill_tokens_per_shard] * limits.num_prefill_shards  # still free, per prefill shard
        self._prefill_slots = [limits.max_prefill_slots_per_shard] * limits.num_prefill_shards

    @property
    def waiting(self) -> list[Sequence]:
        """Those that wait, in order of arrival."""
        return list(self._scheduler.waiting.values())

    @property
    def oldest_waiting(self) -> Sequence | None:
        return next(iter(self._scheduler.waiting.values()), None)

    @property
    def running(self) -> list[Sequence]:
        """Those that are resident and have something to run, in order of admission."""
        return [sequence for sequence in self._scheduler.running.values() if not sequence.exhausted]

    @property
    def num_resident(self) -> int:
        return len(self._scheduler.running)

    def admit(self, sequence: Sequence) -> bool:
        """Reserve slot and pages for a waiting sequence on the shard with most room; it need not run in this iteration."""
        return self._admit(sequence, list(range(self._limits.num_shards)))

    def start(self, sequence: Sequence, *, chunked: bool = False) -> bool:
        """Admit a waiting sequence to a shard where it can also run its first chunk now, and run it."""
        least = self._least_chunk(sequence, chunked)
        shards = [shard for shard in range(self._limits.num_shards) if self._prefill_shard(shard, least) is not None]
        return self._admit(sequence, shards) and self.run(sequence, chunked=chunked)

    def run(self, sequence: Sequence, *, chunked: bool = False) -> bool:
        """Give a resident sequence its next decode row, or its prompt, or a chunk of it, as a place in this step.

        A prompt runs whole or not at all, unless `chunked` or it is longer than any step's block of prefill tokens.
        """
        if sequence.prefilling:
            return self._run_prefill(sequence, chunked)
        self._run_decode(sequence)
        return True

    def build(self) -> Batch | None:
        step = Step(tuple(row for _, row in self._decode), tuple(chunk for _, chunk in self._prefill))
        if not step:
            return None
        return Batch(step, tuple(sequence for sequence, _ in self._decode), tuple(sequence for sequence, _ in self._prefill))

    def _admit(self, sequence: Sequence, shards: list[int]) -> bool:
        shard = self._scheduler.pool.choose_shard(self._scheduler.pages_needed(sequence), shards)
        if shard is None:
            return False
        self._scheduler.admit(sequence, shard)
        return True

    def _run_decode(self, sequence: Sequence) -> None:
        position = sequence.num_scheduled
        token = sequence.tokens[position] if position < len(sequence.tokens) else None
        pages = tuple(sequence.pages[: self._limits.pages_for(position + 1)])
        row = DecodeRow(sequence.slot, sequence.shard, token, position, pages, sequence.request.sampling)
        self._decode.append((sequence, row))
        self._advance(sequence, 1)

    def _run_prefill(self, sequence: Sequence, chunked: bool) -> bool:
        prefill_shard = self._prefill_shard(sequence.shard, self._least_chunk(sequence, chunked))
        if prefill_shard is None:
            return False
        start = sequence.num_scheduled
        length = min(sequence.prefill_len - start, self._prefill_tokens[prefill_shard])
        end = start + length
        chunk = PrefillChunk(
            slot=sequence.slot,
            shard=sequence.shard,
            tokens=tuple(sequence.tokens[start:end]),
            start=start,
            pages=tuple(sequence.pages[: self._limits.pages_for(end)]),
            last=end == sequence.prefill_len,
            sampling=sequence.request.sampling,
            prefill_shard=prefill_shard,
        )
        self._prefill.append((sequence, chunk))
        self._prefill_tokens[prefill_shard] -= length
        self._prefill_slots[prefill_shard] -= 1
        self._advance(sequence, length)
        return True

    def _least_chunk(self, sequence: Sequence, chunked: bool) -> int:
        """The smallest number of prompt tokens worth running now."""
        whole = not chunked and sequence.prefill_len <= self._limits.max_prefill_tokens_per_shard
        return sequence.prefill_len - sequence.num_scheduled if whole else 1

    def _prefill_shard(self, shard: int, least: int) -> int | None:
        """The emptiest prefill shard that takes a chunk of at least so many tokens of a sequence on this shard."""
        fitting = [p for p in self._limits.prefill_shards_of(shard) if self._prefill_slots[p] and self._prefill_tokens[p] >= least]
        return max(fitting, key=lambda p: self._prefill_tokens[p], default=None)

    @staticmethod
    def _advance(sequence: Sequence, num_positions: int) -> None:
        sequence.num_scheduled += num_positions
        sequence.num_iterations += 1
