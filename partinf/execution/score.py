"""Scoring: the log-probabilities of given texts, by prefill alone.

Texts are packed into steps of one shape, cut where they are longer than a shard's share of a step; the pages of a text are its own until
its last chunk has run. Of a window it has as many as a chunk and what it sees take, which come round again.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from jax.sharding import Mesh

from partinf.buckets import runner_limits
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import PageTable, PrefillChunk, RowSampling, Step
from partinf.execution.place import place_step
from partinf.foundation.errors import InvalidInput, NotFinite, raise_offences
from partinf.foundation.paging import first_page, most_pages
from partinf.foundation.rounding import ceil_div, round_up
from partinf.model.weights import active_params
from partinf.partition.sharding import whole
from partinf.plans import Bucket, Plan
from partinf.transformer.batch import Blank
from partinf.transformer.params import Params
from partinf.transformer.score import compile_score_step
from partinf.transformer.step import empty_state


@dataclass(frozen=True)
class Scores:
    """The result of one call.

    Attributes:
        logprobs: per text, the log-probability of every token after the first, given those before it.
        errors: texts by their index in the call whose scores end early, because the next one is not finite.
        num_tokens: tokens that were fed, without padding. padded_tokens: with it. seconds: wall time of the steps.
        mfu: 2 · parameters · tokens / (chips · peak · seconds). chip_ms_per_token: chips · seconds / tokens, in milliseconds.
    """

    logprobs: list[list[float]]
    num_tokens: int
    padded_tokens: int
    seconds: float
    mfu: float
    chip_ms_per_token: float
    errors: dict[int, NotFinite] = field(default_factory=dict)


@dataclass
class _Text:
    index: int
    tokens: Sequence[int]
    shard: int
    pages: tuple[tuple[int, ...], ...]
    fed: int = 0
    scores: list[float] = field(default_factory=list)

    def tables(self, end: int, limits: RunnerLimits) -> tuple[PageTable, ...]:
        """Of every group of the cache, the pages up to a position that the next chunk sees."""
        tables = []
        for group, pages in zip(limits.groups, self.pages, strict=True):
            first = first_page(self.fed, group.window, limits.page_size) if group.window else 0
            tables.append(PageTable(tuple(pages[page % len(pages)] for page in range(first, limits.pages_for(end))), first))
        return tuple(tables)

    @property
    def num_fed(self) -> int:
        """Tokens to feed: the last one has no successor to score."""
        return len(self.tokens) - 1


class Scorer:
    """Scores texts under one plan; compiles its step when it is made."""

    def __init__(self, plan: Plan, params: Params, mesh: Mesh) -> None:
        """
        Args:
            plan: with buckets; the largest prefill bucket gives the shape of the step.

        Raises:
            InvalidInput: a plan with pipeline stages, whose steps give no scores of a text by themselves.
        """
        if plan.num_stages > 1:
            raise InvalidInput(
                f"texts are not scored in {plan.num_stages} pipeline stages; score them under a layout without, or "
                "ask an engine with extended sampling for prompt_logprobs"
            )
        bucket = max(plan.buckets, key=lambda b: (b.prefill_tokens, b.prefill_pages))
        self.bucket = Bucket(0, 0, bucket.prefill_tokens, bucket.prefill_slots, bucket.prefill_pages)
        # Its own pages, in addition to the engine's: no more than its texts can fill.
        slots, chunk = self.bucket.prefill_slots, self.bucket.prefill_tokens // plan.prefill_slot_multiple()
        full = round_up(ceil_div(plan.max_len, plan.cache.page_size), plan.num_sequence_shards)
        reach = [most_pages(group.window - 1 + chunk, plan.cache.page_size) if group.window else full for group in plan.cache_groups]
        self._most = [min(full, round_up(pages, plan.num_sequence_shards)) for pages in reach]  # pages of one text, by group
        held = [group.pages_per_shard if group.window else min(full * slots, group.pages_per_shard) for group in plan.cache_groups]
        cache = replace(plan.cache, pages_per_shard=held[0], other_pages=tuple(held[1:]))
        self.plan = replace(plan, cache=cache, buckets=(replace(self.bucket, decode_rows=plan.decode_row_multiple()),))
        self._limits: RunnerLimits = runner_limits(self.plan)
        self._params, self._mesh = params, mesh
        self._unrolled = isinstance(params["layers"], tuple)
        self._whole = whole(mesh)
        self._step = compile_score_step(self.plan, mesh, self.bucket, self._unrolled)
        self._blank = Blank(self.bucket, self.plan)

    def score(self, texts: Sequence[Sequence[int]]) -> Scores:
        """Score token sequences of at least two tokens each.

        Raises:
            InvalidInput: every sequence that is too short, too long, or holds ids outside the vocabulary.
        """
        self._check(texts)
        state = empty_state(self.plan, self._mesh, self._unrolled)
        waiting = deque(enumerate(texts))
        ways = self._limits.num_sequence_shards
        free = [[[list[int]() for _ in range(ways)] for _ in self._limits.groups] for _ in range(self._limits.num_shards)]
        for number, group in enumerate(self._limits.groups):
            for page in range(group.pages_per_shard * self._limits.num_shards):
                shard, place = self._limits.place_of(page, number)
                free[shard][number][place].append(page)
        running: list[_Text] = []
        done: dict[int, _Text] = {}
        steps, started = 0, time.perf_counter()
        while waiting or running:
            self._admit(waiting, running, free)
            state = self._run(state, running)
            steps += 1
            for text in [text for text in running if text.fed == text.num_fed]:
                running.remove(text)
                done[text.index] = text
                for own, pages in zip(free[text.shard], text.pages, strict=True):
                    for index, page in enumerate(pages):
                        own[index % ways].append(page)
        seconds = time.perf_counter() - started
        return self._scores([done[index].scores for index in range(len(texts))], steps, seconds)

    def _check(self, texts: Sequence[Sequence[int]]) -> None:
        longest, vocab = min(self._limits.max_context, self._limits.max_prompt_len + 1), self._limits.vocab_size
        offences = []
        for number, tokens in enumerate(texts, start=1):
            if not 2 <= len(tokens) <= longest:
                offences.append(f"text {number} has {len(tokens)} tokens; from 2 to {longest} can be scored")
            offences += [f"text {number} holds token {token}; valid: 0..{vocab - 1}" for token in set(tokens) if not 0 <= token < vocab]
        if not texts:
            offences.append("no texts; at least one is needed")
        raise_offences(offences)

    def _admit(self, waiting: deque[tuple[int, Sequence[int]]], running: list[_Text], free: list[list[list[list[int]]]]) -> None:
        """Give pages to texts in order, as long as there is room: each on the shard with most free pages, round-robin over its sequence
        shards."""
        while waiting and len(running) < self.bucket.prefill_slots:
            index, tokens = waiting[0]
            counts = [min(most, self._limits.pages_for(len(tokens) - 1)) for most in self._most]
            shard = max(range(len(free)), key=lambda one: sum(map(len, free[one][0])))
            for of_shard, count in zip(free[shard], counts, strict=True):
                if any(len(pages) < ceil_div(count - place, len(of_shard)) for place, pages in enumerate(of_shard)):
                    if not running:
                        raise InvalidInput(f"text {index + 1} needs {count} KV pages; a shard has {sum(map(len, of_shard))}")
                    return
            waiting.popleft()
            pairs = zip(free[shard], counts, strict=True)
            pages = tuple(tuple(of_shard[page % len(of_shard)].pop() for page in range(count)) for of_shard, count in pairs)
            running.append(_Text(index, tokens, shard, pages))

    def _run(self, state: object, running: list[_Text]) -> object:
        """One step: the next chunk of as many running texts as have room."""
        limits, shards = self._limits, self._limits.num_prefill_shards
        used, slots = [0] * shards, [0] * shards
        chosen: list[tuple[_Text, PrefillChunk]] = []
        for text in running:
            target = min(limits.prefill_shards_of(text.shard), key=lambda one: used[one])
            room = limits.max_prefill_tokens_per_shard - used[target]
            count = min(text.num_fed - text.fed, room)
            whole = count == text.num_fed - text.fed
            if slots[target] == limits.max_prefill_slots_per_shard or count == 0 or not (whole or limits.chunks):
                continue
            tokens = tuple(text.tokens[text.fed : text.fed + count])
            tables = text.tables(text.fed + count, limits)
            chunk = PrefillChunk(0, text.shard, tokens, text.fed, tables, True, RowSampling(), target)
            chosen.append((text, chunk))
            used[target] += count
            slots[target] += 1
        placed = place_step(Step((), tuple(chunk for _, chunk in chosen)), self.bucket, self.plan, limits, self._blank)
        targets = np.zeros(self.bucket.prefill_tokens, np.int32)
        spans = []
        for (text, chunk), row in zip(chosen, placed.prefill_rows, strict=True):
            last = int(placed.batch.prefill.last[row])
            span = slice(last + 1 - len(chunk.tokens), last + 1)
            targets[span] = text.tokens[chunk.start + 1 : chunk.end + 1]
            spans.append(span)
        state, scores = self._step(self._params, state, *jax.device_put((placed.batch, targets), self._whole))
        found = np.asarray(scores)
        for (text, chunk), span in zip(chosen, spans, strict=True):
            text.scores += found[span].tolist()
            text.fed = chunk.end
        return state

    def _scores(self, logprobs: list[list[float]], steps: int, seconds: float) -> Scores:
        num_tokens = sum(map(len, logprobs))
        known = [next((place for place, score in enumerate(one) if not math.isfinite(score)), len(one)) for one in logprobs]
        chips, chip = self.plan.slice.num_chips, self.plan.slice.chip
        flops = 2 * active_params(self.plan.model) * num_tokens
        return Scores(
            [one[:count] for one, count in zip(logprobs, known, strict=True)],
            num_tokens,
            steps * self.bucket.prefill_tokens,
            seconds,
            flops / (chips * chip.peak_bf16 * seconds),
            1e3 * chips * seconds / num_tokens,
            {index: NotFinite(count + 1) for index, (one, count) in enumerate(zip(logprobs, known, strict=True)) if count < len(one)},
        )
