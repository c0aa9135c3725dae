"""Whole steps of a plan: the compiled step of a bucket, every lane, token and slot of it in use, through the runner that serves."""

from __future__ import annotations

from dataclasses import replace

from partinf.buckets import runner_limits, with_window_pages
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import DecodeRow, PageTable, PrefillChunk, RowSampling, Step
from partinf.execution.runner import JaxRunner
from partinf.foundation.paging import first_page
from partinf.foundation.rounding import ceil_div, round_up
from partinf.measure.timing import Call
from partinf.partition.sharding import device_mesh
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.transformer.params import random_params

_GREEDY = RowSampling()


def for_buckets(plan: Plan, buckets: tuple[Bucket, ...]) -> Plan:
    """The plan with these buckets, and a cache that holds what the largest of them reads and writes.

    Args:
        buckets: among them one with decode lanes and one with prompts, as a runner wants it.
    """
    size, shards, prompts = plan.cache.page_size, plan.num_shards, plan.prefill_slot_multiple()
    pages, rows = plan.num_sequence_shards, 1
    for bucket in buckets:
        own = ceil_div(bucket.prefill_tokens, max(bucket.prefill_slots, 1) * size) + 1 + bucket.prefill_pages
        slots = ceil_div(bucket.prefill_slots, min(shards, prompts))
        pages = max(pages, bucket.decode_rows // shards * bucket.decode_pages, slots * round_up(own, plan.num_sequence_shards))
        rows = max(rows, bucket.decode_rows + bucket.prefill_slots)
    longest = max(max(bucket.decode_pages, bucket.prefill_pages + bucket.prefill_tokens) * size for bucket in buckets)
    sized = replace(plan, buckets=buckets, cache=CacheConfig(size, pages, rows), max_len=max(longest, plan.max_len))
    return with_window_pages(sized, ceil_div(rows, shards), sized.max_len)


class Steps:
    """The steps of a plan with random weights, compiled and ready to be timed."""

    def __init__(self, plan: Plan, unrolled: bool | None = None) -> None:
        """
        Args:
            plan: from `for_buckets`. unrolled: as `partinf.api.load` chooses if not given.
        """
        mesh = device_mesh(plan)
        if unrolled is None:
            unrolled = plan.unrolled
        self.plan = plan
        self.runner = JaxRunner(plan, random_params(plan, mesh, unrolled), mesh)
        self.runner.warm_up()

    def call(self, bucket: Bucket) -> Call:
        """One step of a bucket; see `step_call`."""
        return step_call(self.runner, bucket)


def step_call(runner: JaxRunner, bucket: Bucket) -> Call:
    """One step of a bucket that is full, from its data on the host to its tokens on the host; in a pipeline, through all stages alone."""
    step = full_step(runner.plan, bucket, runner_limits(runner.plan))

    def call() -> None:
        runner.submit(step)
        runner.collect()

    return call


def full_step(plan: Plan, bucket: Bucket, limits: RunnerLimits) -> Step:
    """A step that fills a bucket: lanes at the end of their last page, prompts of equal length after all of their earlier pages.

    What it computes means nothing; sequences may share pages where a step writes more than the cache holds.
    """
    shards, size = plan.num_shards, plan.cache.page_size
    lanes = bucket.decode_rows // shards
    decode = []
    for lane in range(bucket.decode_rows):
        shard, place = divmod(lane, lanes)
        last = bucket.decode_pages * size - 1
        decode.append(DecodeRow(lane, shard, 1, last, _tables(plan, shard, place, last, bucket.decode_pages), _GREEDY))
    chunks = []
    per_shard = bucket.prefill_slots // limits.num_prefill_shards if bucket.prefill_slots else 0
    start = bucket.prefill_pages * size
    for slot in range(bucket.prefill_slots):
        prefill_shard, place = divmod(slot, per_shard)
        owners = [shard for shard in range(shards) if prefill_shard in limits.prefill_shards_of(shard)]
        shard = owners[slot % len(owners)]
        tokens = bucket.prefill_tokens // limits.num_prefill_shards // per_shard
        tables = _tables(plan, shard, slot // shards if shards > 1 else slot, start, ceil_div(start + tokens, size))
        chunk = PrefillChunk(bucket.decode_rows + slot, shard, (1,) * tokens, start, tables, True, _GREEDY, prefill_shard)
        chunks.append(chunk)
    return Step(tuple(decode), tuple(chunks))


def _tables(plan: Plan, shard: int, place: int, query: int, end: int) -> tuple[PageTable, ...]:
    """By group of the cache, pages of a shard for its `place`-th sequence, from those that a query sees to `end`; from the start again
    where there are no more."""
    ways, tables = plan.num_sequence_shards, []
    for group in plan.cache_groups:
        held, first = group.pages_per_shard // ways, first_page(query, group.window, plan.cache.page_size) if group.window else 0
        before = place * ceil_div(end - first, ways)
        ids = ((shard * ways + page % ways) * held + (before + page // ways) % held for page in range(first, end))
        tables.append(PageTable(tuple(ids), first))
    return tuple(tables)
