"""A runner without a model: its tokens can be worked out by hand, and it checks what it is given as a device never would.

It keeps, per place of the KV cache, the token written there, and reads the context of every row back through its page tables: all of it
where a group of the cache keeps that, and in every group of a window what lies in the windows of the row's queries, which must be the
same. A page that is wrong, shared, stale, missing or let go too early therefore gives another token or an error. Penalties and biases
shift the token by what their slot has counted, so a count that is lost or doubled shows as well. A mask lets the next token pass that it
has.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence

from partinf.engine.constraint import allows
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import (
    DecodeRow,
    PageTable,
    PrefillChunk,
    PromptScore,
    RowSampling,
    SampledToken,
    SlotStart,
    Step,
    StepOutput,
)
from partinf.foundation.paging import first_page

Rule = Callable[[Sequence[int]], int]
"""Context, first token first → the next token. Where no group of the cache keeps all positions, the longest window of it."""


def weighted_sum(vocab_size: int) -> Rule:
    """1·t₀ + 2·t₁ + 3·t₂ + … modulo the vocabulary: depends on every token of the context and on its place."""
    return lambda context: sum(place * token for place, token in enumerate(context, start=1)) % vocab_size


class FakeRunner:
    """Executes steps at submission, in order.

    Attributes:
        steps: every step submitted, oldest first.
    """

    def __init__(self, limits: RunnerLimits, rule: Rule | None = None) -> None:
        self._limits = limits
        self._rule = rule or weighted_sum(limits.vocab_size)
        self._kv: dict[tuple[int, int, int], tuple[int, int]] = {}  # (group, page, offset) → (token, position)
        self._host: dict[tuple[int, int, int], tuple[int, int]] = {}  # the same in host memory
        self._last: dict[int, int] = {}  # slot → token sampled last
        self._sampled: dict[int, int] = {}  # slot → number of the step that sampled it
        self._submitted = 0  # steps so far; `steps` is the reader's, who may shorten it
        self._counted: dict[int, tuple[SlotStart, list[int]]] = {}  # slot → how it started, and what it has counted since
        self._homes: dict[tuple[int, int], int] = {}  # of pages of groups in host memory, the shard that they left
        self._done: deque[StepOutput] = deque()
        self.steps: list[Step] = []

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    def submit(self, step: Step) -> None:
        """Run a step.

        Raises:
            ValueError: what a device would not notice: a full step, slots twice, page tables that do not fit, pages written by two rows.
        """
        self._check(step)
        self.steps.append(step)
        self._submitted += 1
        self._copy(step)
        fed = [self._last[row.slot] if row.token is None else row.token for row in step.decode]
        for start in step.starts:
            self._counted[start.slot] = start, []
        for row, token in zip(step.decode, fed, strict=True):
            self._write(row.tables, row.position, (token,))
            if row.counts:
                self._counted[row.slot][1].append(token)
        for chunk in step.prefill:
            self._write(chunk.tables, chunk.start, chunk.tokens)
            self._context(chunk.slot, chunk.tables, chunk.start, chunk.end)
        decode = tuple(self._sample(row.slot, row.tables, row.position + 1, row.sampling, row.mask) for row in step.decode)
        prefill = tuple(
            self._sample(chunk.slot, chunk.tables, chunk.end, chunk.sampling, chunk.mask) if chunk.last else None for chunk in step.prefill
        )
        scores = tuple(self._score(chunk) for chunk in step.prefill)
        self._done.append(StepOutput(decode, prefill, scores if any(scores) else ()))

    def collect(self) -> StepOutput:
        return self._done.popleft()

    def reset(self) -> None:
        self._done.clear()

    def _copy(self, step: Step) -> None:
        for copies, source, target in ((step.swap_out, self._kv, self._host), (step.swap_in, self._host, self._kv)):
            for copy in copies:
                if source is self._kv:
                    self._homes.update({(copy.group, page): copy.shard for page in copy.host_pages})
                elif any(self._homes.get((copy.group, page)) != copy.shard for page in copy.host_pages):
                    raise ValueError(f"host pages {copy.host_pages} come back to shard {copy.shard}, from which they did not leave")
                ends = (copy.pages, copy.host_pages) if source is self._kv else (copy.host_pages, copy.pages)
                for here, there in zip(*ends, strict=True):
                    for offset in range(self._limits.page_size):
                        target[copy.group, there, offset] = source.get((copy.group, here, offset), (-1, -1))

    def _write(self, tables: tuple[PageTable, ...], start: int, tokens: tuple[int, ...]) -> None:
        size = self._limits.page_size
        for group, (ids, first) in enumerate(tables):
            for position, token in enumerate(tokens, start):
                self._kv[group, ids[position // size - first], position % size] = (token, position)

    def _score(self, chunk: PrefillChunk) -> tuple[PromptScore, ...]:
        ends = range(chunk.start + 1, chunk.start + 1 + len(chunk.targets))
        likeliest = [self._rule(self._context(chunk.slot, chunk.tables, end - 1, end)) for end in ends]
        return tuple(PromptScore(-float(top + target), top, -float(top)) for top, target in zip(likeliest, chunk.targets, strict=True))

    def _sample(self, slot: int, tables: tuple[PageTable, ...], length: int, sampling: RowSampling, mask: bytes | None) -> SampledToken:
        token = self._rule(self._context(slot, tables, length - 1, length))
        if not sampling.greedy:
            key = f"{sampling.seed}/{sampling.sample_index}/{length}"
            token += int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
        if sampling.adjusted:
            start, counted = self._counted[slot]
            generated = (*start.generated, *counted)
            shift = sampling.presence * len(set(generated)) + sampling.frequency * sum(generated)
            shift += (sampling.repetition - 1) * len({*start.prompt, *generated}) + sum(bias for _, bias in start.logit_bias)
            token += int(shift)
        token %= self._limits.vocab_size
        while length < sampling.ends_from and sampling.adjusted and token in self._counted[slot][0].ends:
            token = (token + 1) % self._limits.vocab_size
        if mask is not None:
            following = ((token + other) % self._limits.vocab_size for other in range(self._limits.vocab_size))
            token = next(other for other in following if allows(mask, other))
        self._last[slot], self._sampled[slot] = token, self._submitted
        top = tuple(((token + other) % self._limits.vocab_size, -float(token + other)) for other in range(sampling.top_logprobs))
        return SampledToken(token, -float(token), top)

    def _context(self, slot: int, tables: tuple[PageTable, ...], start: int, end: int) -> list[int]:
        """The tokens that queries at these positions read through the first table, once the others have been found to hold the same."""
        size, context = self._limits.page_size, list[int]()
        for number, (group, (ids, first)) in enumerate(zip(self._limits.groups, tables, strict=True)):
            found = []
            for position in range(max(0, start - group.window + 1) if group.window else 0, end):
                page = ids[position // size - first] if position // size >= first else None
                token, written = (-1, -1) if page is None else self._kv.get((number, page, position % size), (-1, -1))
                if written != position:
                    raise ValueError(f"slot {slot}: page {page} of group {number} holds position {written}, where {position} is read")
                found.append(token)
            context = context or found
            if context[len(context) - len(found) :] != found:
                raise ValueError(f"slot {slot}: group {number} holds {found}, which are not the last of {context}")
        return context

    def _check(self, step: Step) -> None:
        problems = [*self._shape_problems(step), *self._page_problems(step)]
        problems += [problem for chunk in step.prefill for problem in self._chunk_problems(chunk)]
        for row in step.decode:
            if row.token is None and row.slot not in self._last:
                problems.append(f"slot {row.slot}: no token was sampled in it yet")
            elif row.token is None and self._submitted + 1 - self._sampled[row.slot] < self._limits.num_stages:
                problems.append(f"slot {row.slot}: its last token has not come out of the pipeline yet")
        rows: tuple[DecodeRow | PrefillChunk, ...] = (*step.decode, *step.prefill)
        ready = self._counted.keys() | {start.slot for start in step.starts}
        problems += [f"slot {row.slot}: it was not started" for row in rows if row.sampling.adjusted and row.slot not in ready]
        tokens = [row.token for row in step.decode if row.token is not None] + [t for chunk in step.prefill for t in chunk.tokens]
        problems += [f"token {token} is outside the vocabulary" for token in tokens if not 0 <= token < self._limits.vocab_size]
        if problems:
            raise ValueError("; ".join(problems))

    def _shape_problems(self, step: Step) -> list[str]:
        limits, problems = self._limits, []
        if not step:
            problems.append("the step is empty")
        slots = [row.slot for row in step.decode] + [chunk.slot for chunk in step.prefill]
        if len(set(slots)) < len(slots) or not set(slots) <= set(range(limits.num_slots)):
            problems.append(f"slots {sorted(slots)} are not distinct ones of {limits.num_slots}")
        for shard in range(limits.num_shards):
            if sum(row.shard == shard for row in step.decode) > limits.max_decode_rows_per_shard:
                problems.append(f"shard {shard} has more than {limits.max_decode_rows_per_shard} decode rows")
        for shard in range(limits.num_prefill_shards):
            chunks = [chunk for chunk in step.prefill if chunk.prefill_shard == shard]
            if len(chunks) > limits.max_prefill_slots_per_shard:
                problems.append(f"prefill shard {shard} has more than {limits.max_prefill_slots_per_shard} chunks")
            if sum(len(chunk.tokens) for chunk in chunks) > limits.max_prefill_tokens_per_shard:
                problems.append(f"prefill shard {shard} has more than {limits.max_prefill_tokens_per_shard} tokens")
        return problems

    def _chunk_problems(self, chunk: PrefillChunk) -> list[str]:
        problems = []
        if not chunk.tokens:
            problems.append(f"slot {chunk.slot}: an empty chunk")
        if chunk.prefill_shard not in self._limits.prefill_shards_of(chunk.shard):
            problems.append(f"slot {chunk.slot}: shard {chunk.shard} cannot prefill on shard {chunk.prefill_shard}")
        return problems

    def _page_problems(self, step: Step) -> list[str]:
        limits = self._limits
        problems = [
            f"pages {copy.pages} are not all of shard {copy.shard}"
            for copy in (*step.swap_out, *step.swap_in)
            if not self._placed(PageTable(copy.pages, copy.first), copy.shard, copy.group)
        ]
        writers: dict[tuple[int, int], int] = {}
        rows: tuple[DecodeRow | PrefillChunk, ...] = (*step.decode, *step.prefill)
        for row in rows:
            start, end = (row.position, row.position + 1) if isinstance(row, DecodeRow) else (row.start, row.end)
            for number, (group, table) in enumerate(zip(limits.groups, row.tables, strict=True)):
                ids, first = table
                if not 0 <= row.shard < limits.num_shards or not self._placed(table, row.shard, number):
                    problems.append(f"slot {row.slot}: pages {ids} are not all of shard {row.shard}")
                most = first_page(start, group.window, limits.page_size) if group.window else 0
                if not 0 <= start < end <= limits.max_len or first + len(ids) != limits.pages_for(end) or not 0 <= first <= most:
                    problems.append(f"slot {row.slot}: {first + len(ids)} pages for positions up to {end}, {first} of them let go")
                    continue
                for page in ids[start // limits.page_size - first :]:
                    if writers.setdefault((number, page), row.slot) != row.slot:
                        problems.append(f"page {page} is written by slots {writers[number, page]} and {row.slot}")
        return problems

    def _placed(self, table: PageTable, shard: int, group: int) -> bool:
        """Whether pages are on their shard and sequence shard."""
        ways, place_of = self._limits.num_sequence_shards, self._limits.place_of
        return all(place_of(page, group) == (shard, index % ways) for index, page in enumerate(table.ids, start=table.first))
