"""A runner without a model: its tokens can be worked out by hand, and it checks what it is given as a device never would.

It keeps, per place of the KV cache, the token written there, and reads the context of every row back through its page table. A page
that is wrong, shared, stale or missing therefore gives another token or an error. Penalties and biases shift the token by what their
slot has counted, so a count that is lost or doubled shows as well. A mask lets the next token pass that it has.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence

from partinf.engine.constraint import allows
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import DecodeRow, PrefillChunk, PromptScore, RowSampling, SampledToken, SlotStart, Step, StepOutput

Rule = Callable[[Sequence[int]], int]
"""Context, first token first → the next token."""


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
        self._kv: dict[tuple[int, int], tuple[int, int]] = {}  # (page, offset) → (token, position)
        self._host: dict[tuple[int, int], tuple[int, int]] = {}  # the same in host memory
        self._last: dict[int, int] = {}  # slot → token sampled last
        self._sampled: dict[int, int] = {}  # slot → number of the step that sampled it
        self._submitted = 0  # steps so far; `steps` is the reader's, who may shorten it
        self._counted: dict[int, tuple[SlotStart, list[int]]] = {}  # slot → how it started, and what it has counted since
        self._homes: dict[int, int] = {}  # of pages in host memory, the shard that they left
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
            self._write(row.pages, row.position, (token,))
            if row.counts:
                self._counted[row.slot][1].append(token)
        for chunk in step.prefill:
            self._write(chunk.pages, chunk.start, chunk.tokens)
        decode = tuple(self._sample(row.slot, row.pages, row.position + 1, row.sampling, row.mask) for row in step.decode)
        prefill = tuple(
            self._sample(chunk.slot, chunk.pages, chunk.end, chunk.sampling, chunk.mask) if chunk.last else None for chunk in step.prefill
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
                    self._homes.update(dict.fromkeys(copy.host_pages, copy.shard))
                elif any(self._homes.get(page) != copy.shard for page in copy.host_pages):
                    raise ValueError(f"host pages {copy.host_pages} come back to shard {copy.shard}, from which they did not leave")
                ends = (copy.pages, copy.host_pages) if source is self._kv else (copy.host_pages, copy.pages)
                for here, there in zip(*ends, strict=True):
                    for offset in range(self._limits.page_size):
                        target[there, offset] = source.get((here, offset), (-1, -1))

    def _write(self, pages: tuple[int, ...], start: int, tokens: tuple[int, ...]) -> None:
        size = self._limits.page_size
        for position, token in enumerate(tokens, start):
            self._kv[pages[position // size], position % size] = (token, position)

    def _score(self, chunk: PrefillChunk) -> tuple[PromptScore, ...]:
        context = self._context(chunk.slot, chunk.pages, chunk.end)
        ends = range(chunk.start + 1, chunk.start + 1 + len(chunk.targets))
        likeliest = [self._rule(context[:end]) for end in ends]
        return tuple(PromptScore(-float(top + target), top, -float(top)) for top, target in zip(likeliest, chunk.targets, strict=True))

    def _sample(self, slot: int, pages: tuple[int, ...], length: int, sampling: RowSampling, mask: bytes | None) -> SampledToken:
        token = self._rule(self._context(slot, pages, length))
        if not sampling.greedy:
            key = f"{sampling.seed}/{sampling.sample_index}/{length}"
            token += int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
        if sampling.steered:
            start, counted = self._counted[slot]
            generated = (*start.generated, *counted)
            shift = sampling.presence * len(set(generated)) + sampling.frequency * sum(generated)
            shift += (sampling.repetition - 1) * len({*start.prompt, *generated}) + sum(bias for _, bias in start.logit_bias)
            token += int(shift)
        token %= self._limits.vocab_size
        while length < sampling.ends_from and sampling.steered and token in self._counted[slot][0].ends:
            token = (token + 1) % self._limits.vocab_size
        if mask is not None:
            following = ((token + other) % self._limits.vocab_size for other in range(self._limits.vocab_size))
            token = next(other for other in following if allows(mask, other))
        self._last[slot], self._sampled[slot] = token, self._submitted
        top = tuple(((token + other) % self._limits.vocab_size, -float(token + other)) for other in range(sampling.top_logprobs))
        return SampledToken(token, -float(token), top)

    def _context(self, slot: int, pages: tuple[int, ...], length: int) -> list[int]:
        """The tokens that a row reads through its page table."""
        size = self._limits.page_size
        context = []
        for position in range(length):
            token, written = self._kv.get((pages[position // size], position % size), (-1, -1))
            if written != position:
                raise ValueError(f"slot {slot}: page {pages[position // size]} holds position {written}, where {position} is read")
            context.append(token)
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
        problems += [f"slot {row.slot}: it was not started" for row in rows if row.sampling.steered and row.slot not in ready]
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
            if any(limits.place_of(page) != (copy.shard, index % limits.num_parts) for index, page in enumerate(copy.pages))
        ]
        writers: dict[int, int] = {}
        rows: tuple[DecodeRow | PrefillChunk, ...] = (*step.decode, *step.prefill)
        for row in rows:
            start, end = (row.position, row.position + 1) if isinstance(row, DecodeRow) else (row.start, row.end)
            places = [(row.shard, index % limits.num_parts) for index in range(len(row.pages))]
            if not 0 <= row.shard < limits.num_shards or list(map(limits.place_of, row.pages)) != places:
                problems.append(f"slot {row.slot}: pages {row.pages} are not all of shard {row.shard}")
            if not 0 <= start < end <= limits.max_len or len(row.pages) != limits.pages_for(end):
                problems.append(f"slot {row.slot}: {len(row.pages)} pages for positions up to {end}")
                continue
            for page in row.pages[start // limits.page_size :]:
                if writers.setdefault(page, row.slot) != row.slot:
                    problems.append(f"page {page} is written by slots {writers[page]} and {row.slot}")
        return problems
