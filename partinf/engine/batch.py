"""One iteration while a policy puts it together: the `Policy` protocol, the `BatchBuilder` that it fills, the `ScheduledBatch` that comes
out.

What a step can hold, slots, pages and positions are settled here, once for all policies; a policy only says who.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from partinf.engine.request import Sequence, Status
from partinf.engine.roster import Roster
from partinf.engine.step import DecodeRow, PageCopy, PrefillChunk, SlotStart, Step
from partinf.foundation.rounding import ceil_div


@dataclass(frozen=True)
class ScheduledBatch:
    """A step and the sequences behind its rows, in the same order.

    Attributes:
        samples: per decode row, whether its token is a new one; a row that feeds a known token before the last known one samples nothing.
    """

    step: Step
    decode: tuple[Sequence, ...]
    prefill: tuple[Sequence, ...]
    samples: tuple[bool, ...] = ()

    @property
    def num_sequences(self) -> int:
        return len(self.decode) + len(self.prefill)


class Policy(Protocol):
    """Which sequences run in the next iteration.

    A policy may have an attribute `returns_whole_batches`: requests that end wait for the last resident one before they are returned.
    """

    def schedule(self, batch: BatchBuilder) -> None:
        """Fill `batch` by calling its methods. It must run something whenever nothing else is in flight."""
        ...


class BatchBuilder:
    """One iteration while a policy puts it together.

    `run` gives a resident sequence its next token or chunk; `admit` makes a waiting one resident; `start` does both or neither.
    `preempt` and `swap_out` take a sequence's pages away between two of its tokens; `swap_in` brings it back. Each says whether it could.
    """

    def __init__(self, roster: Roster, now: float = 0.0) -> None:
        limits = roster.limits
        self.now = now
        self.limits = limits
        self._roster = roster
        self._number = roster.num_steps
        self._decode: list[tuple[Sequence, DecodeRow, bool]] = []
        self._prefill: list[tuple[Sequence, PrefillChunk]] = []
        self._copies: tuple[list[PageCopy], list[PageCopy]] = ([], [])  # out, in
        self._starts: list[SlotStart] = []
        self._taken: set[int] = set()  # numbers of those in this step, or swapped in by it
        self._decode_rows = [limits.max_decode_rows_per_shard] * limits.num_shards  # still free, per shard
        self._prefill_tokens = [limits.max_prefill_tokens_per_shard] * limits.num_prefill_shards  # the same, per prefill shard
        self._prefill_slots = [limits.max_prefill_slots_per_shard] * limits.num_prefill_shards
        self._idle = [0, 0]

    # Who is there.

    @property
    def waiting(self) -> list[Sequence]:
        """Those that wait, in order of arrival; samples that share a prompt only once its pages are there."""
        return [sequence for sequence in self._roster.waiting.values() if not sequence.waits_for_first]

    @property
    def oldest_waiting(self) -> Sequence | None:
        return next((sequence for sequence in self._roster.waiting.values() if not sequence.waits_for_first), None)

    @property
    def running(self) -> list[Sequence]:
        """Those that are resident and have something to run now, in order of admission."""
        return [sequence for sequence in self._roster.running.values() if self.ready(sequence)]

    @property
    def swapped(self) -> list[Sequence]:
        """The sequences whose pages are in host memory, in the order in which they left."""
        return list(self._roster.swapped.values())

    @property
    def num_resident(self) -> int:
        return len(self._roster.running)

    def most_rows(self, max_batch_size: int | None = None) -> int:
        """Rows of a step: as many as a policy allows, and no more than a fair share when all that could run are spread over the pipeline
        stages, so that none stands empty while another is crowded."""
        roster, limits = self._roster, self.limits
        runnable = min(len(roster.running) + len(roster.waiting) + len(roster.swapped), limits.num_slots)
        return min(max_batch_size or limits.num_slots, max(1, ceil_div(runnable, limits.num_stages)))

    @property
    def num_rows(self) -> int:
        """Sequences in this step so far."""
        return len(self._decode) + len(self._prefill)

    def ready(self, sequence: Sequence) -> bool:
        """Whether a resident has something to run now: its next token is known, or will have come out of the pipeline when it is fed. Under
        a grammar it must be known, and what may follow it."""
        if sequence.unmasked:
            return False
        known = not sequence.in_flight or sequence.num_scheduled < len(sequence.tokens)
        fed = known or (sequence.mask is None and self._number - sequence.last_step >= self.limits.num_stages)
        return fed and sequence.num_scheduled < sequence.max_positions

    def taken(self, sequence: Sequence) -> bool:
        """Whether this step runs the sequence or swaps it in, so that its pages must stay."""
        return sequence.request.number in self._taken

    def missing_pages(self, sequence: Sequence) -> int:
        """Pages that a resident's next token needs beyond those that it has and those that are free on its shard."""
        return self._roster.pool.missing_pages(sequence, self.limits.pages_for(sequence.num_scheduled + 1))

    def can_prefill(self, sequence: Sequence) -> bool:
        """Whether this step has room for the prompt of a waiting sequence, pages and slots aside."""
        least = self._least_chunk(len(sequence.tokens), 0, chunked=False)
        return any(self._prefill_shard(shard, least) is not None for shard in range(self.limits.num_shards))

    @property
    def prefill_is_full(self) -> bool:
        """Whether no prompt at all can begin in this step any more."""
        return not any(slots and tokens for slots, tokens in zip(self._prefill_slots, self._prefill_tokens, strict=True))

    def free_pages(self, shard: int | None = None) -> int:
        """Pages that no sequence holds, of one shard or of all."""
        pool = self._roster.pool
        return pool.num_free_pages if shard is None else pool.free_pages(shard)

    @property
    def num_free_slots(self) -> int:
        """How many more may become resident, pages aside."""
        return self._roster.pool.num_free_slots

    # What can be done with them.

    def admit(self, sequence: Sequence, *, reserve: bool = False, crowd: bool = False) -> bool:
        """Give slot and pages to a waiting sequence on the shard with most room; it need not run in this iteration.

        Args:
            reserve: all pages that it can ever need, so that it never waits for more; otherwise those of its prompt.
            crowd: let more sequences be resident than a step has decode rows.
        """
        return self._admit(sequence, list(range(self.limits.num_shards)), reserve, crowd)

    def start(self, sequence: Sequence, *, chunked: bool = False, reserve: bool = False, crowd: bool = False) -> bool:
        """Admit a waiting sequence to a shard where it can also run its first chunk now, and run it."""
        least = self._least_chunk(len(sequence.tokens), 0, chunked)
        shards = [shard for shard in range(self.limits.num_shards) if self._prefill_shard(shard, least) is not None]
        return bool(shards) and self._admit(sequence, shards, reserve, crowd) and self.run(sequence, chunked=chunked)

    def run(self, sequence: Sequence, *, chunked: bool = False, at_most: int | None = None) -> bool:
        """Give a resident sequence its next decode row, or its prompt, or a chunk of it, as a place in this step.

        A prompt runs whole or not at all, unless `chunked`, `at_most` (tokens of it), or it is longer than any step's block of prefill
        tokens.
        """
        if sequence.num_scheduled >= sequence.prefill_len or (sequence.num_scheduled and not self.limits.chunks):
            return self.run_token(sequence)
        return self._run_prefill(sequence, chunked, None if sequence.scoring else at_most)

    def run_token(self, sequence: Sequence) -> bool:
        """Give a resident sequence a decode row, which feeds the next known token of its prompt if it is not past that.

        A prompt whose log-probabilities are wanted is not fed that way: a decode row does not give them.
        """
        if sequence.scoring:
            return self._run_prefill(sequence, chunked=True, at_most=None)
        position, shard = sequence.num_scheduled, sequence.shard
        num_pages = position // self.limits.page_size + 1
        if not self._decode_rows[shard]:
            return False
        if position >= sequence.num_covered and not self._roster.pool.grow(sequence, num_pages):
            return False
        token = sequence.tokens[position] if position < len(sequence.tokens) else None
        sampling = sequence.request.sampling
        counts = sampling.adjusted and position >= sequence.prefill_len
        new = position + 1 >= sequence.prefill_len
        mask = sequence.mask if new else None
        row = DecodeRow(sequence.slot, shard, token, position, sequence.tables(num_pages), sampling, counts, mask)
        self._decode.append((sequence, row, new))
        self._decode_rows[shard] -= 1
        self._advance(sequence, 1)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Let a resident sequence wait again, without its pages: what it knows is computed again when it is admitted the next time."""
        assert not self.taken(sequence), f"request {sequence.request.id} is in the step that preempts it"
        self._roster.preempt(sequence)

    def swap_out(self, sequence: Sequence) -> bool:
        """Move a resident sequence's pages to host memory; False when that is full."""
        assert not self.taken(sequence), f"request {sequence.request.id} is in the step that swaps it out"
        if not sequence.num_scheduled:  # nothing to move yet
            self._roster.preempt(sequence)
            return True
        copies = self._roster.swap_out(sequence)
        self._copies[0].extend(copies or ())
        return copies is not None

    def swap_in(self, sequence: Sequence) -> bool:
        """Bring a swapped sequence back to the shard from which it came, with room for its next token, or for the rest of its prompt; it
        need not run in this iteration."""
        if sequence.in_flight:  # its last token is known when that step is committed
            return False
        needed = max(sequence.prefill_len, min(sequence.num_scheduled + 1, sequence.max_positions))
        num_pages = self.limits.pages_for(max(needed, sequence.num_scheduled))
        if self._roster.pool.choose_shard(num_pages, (sequence.home,), sequence, crowd=True) is None:
            return False
        self._copies[1].extend(self._roster.swap_in(sequence, num_pages))
        self._taken.add(sequence.request.number)
        return True

    def pad(self, rows: int, tokens: int) -> None:
        """Let the step spend so many decode rows and prompt tokens on padding, as a batch does that runs to its longest member's end."""
        self._idle = [rows, tokens]

    def build(self) -> ScheduledBatch | None:
        decode, prefill = tuple(row for _, row, _ in self._decode), tuple(chunk for _, chunk in self._prefill)
        step = Step(decode, prefill, tuple(self._copies[0]), tuple(self._copies[1]), tuple(self._starts), *self._idle)
        for sequence, chunk in self._prefill:
            sequence.num_readable = chunk.end
            self._roster.pool.remember(sequence, chunk.end)
        self._roster.pool.step_is_built()
        if not step:
            return None
        self._roster.num_steps += 1
        sequences = tuple(sequence for sequence, _, _ in self._decode), tuple(sequence for sequence, _ in self._prefill)
        for taken in sequences:
            self._roster.pool.trim(taken)
        return ScheduledBatch(step, *sequences, tuple(new for _, _, new in self._decode))

    def _admit(self, sequence: Sequence, shards: list[int], reserve: bool, crowd: bool) -> bool:
        if sequence.in_flight or sequence.status is not Status.WAITING:  # preempted; its last token is not known yet
            return False
        num_pages = self.limits.pages_for(sequence.max_positions if reserve else len(sequence.tokens))
        shard = self._roster.pool.choose_shard(num_pages, shards, sequence, crowd)
        if shard is None:
            return False
        self._roster.admit(sequence, shard, num_pages)
        return True

    def _run_prefill(self, sequence: Sequence, chunked: bool, at_most: int | None) -> bool:
        least = 1 if at_most is not None else self._least_chunk(sequence.prefill_len, sequence.num_scheduled, chunked)
        prefill_shard = self._prefill_shard(sequence.shard, least)
        if prefill_shard is None:
            return False
        start = sequence.num_scheduled
        length = min(sequence.prefill_len - start, self._prefill_tokens[prefill_shard])
        if at_most is not None:
            length = min(length, at_most)
        end = start + length
        if end > sequence.num_covered:  # pages of windows; others it has for the whole prompt
            grown = self._roster.pool.grow(sequence, self.limits.pages_for(end))
            assert grown, f"request {sequence.request.id} has no pages for its prompt"
        targets: tuple[int, ...] = ()
        if sequence.scoring:
            targets = sequence.request.prompt[start + 1 : end + 1]
            sequence.scoring = end + 1 < len(sequence.request.prompt)
        chunk = PrefillChunk(
            slot=sequence.slot,
            shard=sequence.shard,
            tokens=tuple(sequence.tokens[start:end]),
            start=start,
            tables=sequence.tables(self.limits.pages_for(end)),
            last=end == sequence.prefill_len,
            sampling=sequence.request.sampling,
            prefill_shard=prefill_shard,
            targets=targets,
            mask=sequence.mask if end == sequence.prefill_len else None,
        )
        self._prefill.append((sequence, chunk))
        self._prefill_tokens[prefill_shard] -= length
        self._prefill_slots[prefill_shard] -= 1
        self._advance(sequence, length)
        return True

    def _least_chunk(self, prefill_len: int, done: int, chunked: bool) -> int:
        """The smallest number of prompt tokens worth running now."""
        whole = not chunked and prefill_len <= self.limits.max_prefill_tokens_per_shard
        return prefill_len - done if whole else 1

    def _prefill_shard(self, shard: int, least: int) -> int | None:
        """The emptiest prefill shard that takes a chunk of at least so many tokens of a sequence on this shard."""
        fitting = [p for p in self.limits.prefill_shards_of(shard) if self._prefill_slots[p] and self._prefill_tokens[p] >= least]
        return max(fitting, key=lambda p: self._prefill_tokens[p], default=None)

    def _advance(self, sequence: Sequence, num_positions: int) -> None:
        if sequence.request.sampling.adjusted and not sequence.started_slot:
            self._start_slot(sequence)
        sequence.num_scheduled += num_positions
        sequence.num_iterations += 1
        sequence.in_flight += 1
        sequence.last_step = self._number
        self._taken.add(sequence.request.number)

    def _start_slot(self, sequence: Sequence) -> None:
        """Tell the runner what a sequence has so far. All of it is known: no sequence becomes resident while it has a step in flight."""
        request, known = sequence.request, max(sequence.prefill_len, sequence.num_scheduled)
        generated = tuple(sequence.tokens[len(request.prompt) : known])
        ends = request.ends if request.params.min_tokens else ()
        self._starts.append(SlotStart(sequence.slot, request.prompt, generated, request.params.logit_bias, ends))
        sequence.started_slot = True
