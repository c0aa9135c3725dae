"""Where the rows of a step lie in the arrays of its bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from partinf.engine.runner import RunnerLimits
from partinf.engine.step import PageTable, RowSampling, Step
from partinf.foundation.paging import table_start
from partinf.plans import Bucket, Plan
from partinf.transformer.batch import ADJUSTED, ENDS_LATER, Batch, Blank, Tables


@dataclass(frozen=True)
class Placed:
    """A step in its bucket: the arrays, and the rows of the output where the step's decode rows and chunks are found.

    Attributes:
        vector: the arrays as `pack` makes them of the batch.
        scored: per chunk, the flat prompt tokens after which its targets come.
    """

    batch: Batch
    vector: np.ndarray
    decode_rows: tuple[int, ...]
    prefill_rows: tuple[int | None, ...]
    scored: tuple[slice, ...] = ()


def place_step(step: Step, bucket: Bucket, plan: Plan, limits: RunnerLimits, blank: Blank | None = None) -> Placed:
    """Lay the step out in the bucket: lanes in equal blocks per shard, prompt tokens in equal blocks per prefill shard.

    Args:
        blank: of the bucket, where there is one already.
    """
    vector, batch = (blank or Blank(bucket, plan)).copy()
    decode_rows = _place_decode(step, bucket, plan, limits, batch)
    prefill_rows, scored = _place_prefill(step, bucket, limits, batch)
    return Placed(batch, vector, decode_rows, prefill_rows, scored)


def _place_decode(step: Step, bucket: Bucket, plan: Plan, limits: RunnerLimits, batch: Batch) -> tuple[int, ...]:
    rows = _lanes(step, bucket, plan)
    if not rows:
        return rows
    batch.decode.token[list(rows)] = [-1 if row.token is None else row.token for row in step.decode]
    batch.decode.slot[list(rows)] = [row.slot for row in step.decode]
    batch.decode.position[list(rows)] = [row.position for row in step.decode]
    for lane, row in zip(rows, step.decode, strict=True):
        how = row.sampling
        if how.greedy and row.mask is None and not how.extended:
            continue  # as it is in an empty batch
        _place_sampling(batch, lane, how, row.position + 1, row.mask is not None)
        if row.counts:
            assert batch.extended is not None  # such a step goes into an extended bucket
            batch.extended.counted[lane] = 1
    for number, (group, tables) in enumerate(zip(limits.groups, batch.decode.tables, strict=True)):
        if not group.window:
            _place_whole_tables(tables.pages, rows, [row.tables[number].ids for row in step.decode])
            continue
        for lane, row in zip(rows, step.decode, strict=True):
            _place_table(tables, lane, row.tables[number], row.position, row.position + 1, group.window, limits)
    return rows


def _lanes(step: Step, bucket: Bucket, plan: Plan) -> tuple[int, ...]:
    """Of every decode row: the next one of its shard's block."""
    if plan.num_shards == 1:
        return tuple(range(len(step.decode)))
    lanes, used = bucket.decode_rows // plan.num_shards, [0] * plan.num_shards
    rows = []
    for row in step.decode:
        rows.append(row.shard * lanes + used[row.shard])
        used[row.shard] += 1
    return tuple(rows)


def _place_whole_tables(pages: np.ndarray, rows: Sequence[int], tables: Sequence[tuple[int, ...]]) -> None:
    """Tables from position 0 on at the beginning of their rows, all of them by one assignment, since a step has as many as rows."""
    counts = np.array([len(ids) for ids in tables])
    total, before = int(counts.sum()), np.cumsum(counts) - counts
    ids = np.fromiter(chain.from_iterable(tables), np.int32, total)
    pages[np.repeat(rows, counts), np.arange(total) - np.repeat(before, counts)] = ids


def _place_prefill(step: Step, bucket: Bucket, limits: RunnerLimits, batch: Batch) -> tuple[tuple[int | None, ...], tuple[slice, ...]]:
    shards, prefill = limits.num_prefill_shards, batch.prefill
    tokens, slots = [0] * shards, [0] * shards
    rows: list[int | None] = []
    scored = []
    for chunk in step.prefill:
        shard, count = chunk.prefill_shard, len(chunk.tokens)
        first = shard * (bucket.prefill_tokens // shards) + tokens[shard]
        slot = shard * (bucket.prefill_slots // shards) + slots[shard]
        tokens[shard] += count
        slots[shard] += 1
        positions = np.arange(chunk.start, chunk.end)
        span = slice(first, first + count)
        prefill.token[span] = chunk.tokens
        prefill.owner[span] = slot
        prefill.position[span] = positions
        prefill.start[slot] = chunk.start
        for table, group, page, tables in zip(chunk.tables, limits.groups, prefill.page, prefill.tables, strict=True):
            page[span] = np.asarray(table.ids)[positions // limits.page_size - table.first]
            _place_table(tables, slot, table, chunk.start, chunk.start, group.window, limits)
        scored.append(slice(first, first + len(chunk.targets)))
        if chunk.targets:
            assert batch.extended is not None
            batch.extended.target[scored[-1]] = chunk.targets
        if chunk.last:
            prefill.last[slot], prefill.slot[slot] = first + count - 1, chunk.slot
            _place_sampling(batch, bucket.decode_rows + slot, chunk.sampling, chunk.end, chunk.mask is not None)
        rows.append(bucket.decode_rows + slot if chunk.last else None)
    return tuple(rows), tuple(scored)


def _place_table(tables: Tables, row: int, table: PageTable, query: int, end: int, window: int, limits: RunnerLimits) -> None:
    """The pages of positions before `end` that a query at position `query` sees."""
    begin, last = 0, limits.pages_for(end)
    if tables.begin is not None:
        begin = table_start(query, window, limits.page_size, limits.num_sequence_shards)
        tables.begin[row] = begin * limits.page_size
    first = max(begin, table.first)  # none before are seen
    tables.pages[row, first - begin : max(first, last) - begin] = table.ids[first - table.first : max(first, last) - table.first]


def _place_sampling(batch: Batch, row: int, how: RowSampling, position: int, constrained: bool) -> None:
    sampling, extended = batch.sampling, batch.extended
    if not how.greedy:
        sampling.temperature[row], sampling.top_k[row] = how.temperature, how.top_k
        sampling.top_p[row], sampling.min_p[row] = how.top_p, how.min_p
        sampling.seed[row], sampling.sample[row], sampling.position[row] = how.seed, how.sample_index, position
    if constrained:
        assert batch.constrained is not None  # such a step goes into a constrained bucket
        batch.constrained[row] = 1
    if extended is not None and how.extended:
        extended.adjusted[row] = how.adjusted * (ENDS_LATER if position < how.ends_from else ADJUSTED)
        extended.alternatives[row] = how.top_logprobs
        extended.presence[row], extended.frequency[row], extended.repetition[row] = how.presence, how.frequency, how.repetition
