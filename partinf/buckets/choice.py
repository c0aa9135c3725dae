"""What a step may hold in all buckets of a plan, and which of them it runs in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from partinf.engine.runner import PageGroup, RunnerLimits
from partinf.engine.step import Step
from partinf.foundation.errors import InvalidInput
from partinf.layout import AttentionRole
from partinf.plans import Bucket, Plan


def runner_limits(plan: Plan, num_host_pages: int = 0, *others: int) -> RunnerLimits:
    """What steps of this plan may hold, over all its buckets.

    Args:
        num_host_pages: pages of the first group of the cache that may lie in host memory. others: of each further one; as many if they
            are not given.
    """
    biggest = max(plan.buckets, key=lambda bucket: (bucket.prefill_tokens, bucket.decode_rows))
    groups = plan.cache_groups
    kept_of = list(zip(groups, (num_host_pages, *(others or (num_host_pages,) * (len(groups) - 1))), strict=True))
    alone = [bucket for bucket in plan.buckets if bucket.decode_rows and not bucket.prefill_tokens]
    prefill_shards = _prefill_shards(plan)
    num_prefill_shards = plan.prefill_slot_multiple()
    return RunnerLimits(
        max_decode_rows_per_shard=max(bucket.decode_rows for bucket in alone or plan.buckets) // plan.num_shards,
        max_prefill_tokens=biggest.prefill_tokens,
        max_prefill_slots_per_shard=biggest.prefill_slots // num_prefill_shards,
        page_size=plan.cache.page_size,
        pages_per_shard=sum(group.pages_per_shard for group in groups if not group.window),
        num_shards=plan.num_shards,
        num_sequence_shards=plan.num_sequence_shards,
        num_slots=plan.cache.num_slots,
        max_len=plan.max_len,
        vocab_size=plan.model.vocab_size,
        num_prefill_shards=num_prefill_shards,
        prefill_shards=prefill_shards,
        chunks=any(bucket.prefill_pages for bucket in plan.buckets),
        random=all(bucket.random for bucket in plan.buckets),
        extended=all(bucket.extended for bucket in plan.buckets),
        constrained=all(bucket.constrained for bucket in plan.buckets),
        num_stages=plan.num_stages,
        num_host_pages=num_host_pages,
        windows=tuple(PageGroup(group.window, group.pages_per_shard, kept) for group, kept in kept_of if group.window),
    )


def _prefill_shards(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Per shard of decode's batch axes, the shards of prefill's that lie where it does along every axis that splits requests in both
    phases: a prompt's K/V come to its owner's pages along the other axes only."""
    ours, theirs = plan.batch_axes, plan.layout.prefill.attention_axes(AttentionRole.BATCH)
    shared = [axis for axis in ours if axis in theirs]

    def places(axes: Sequence[str]) -> Iterator[tuple[int, ...]]:
        """Per shard of these axes, in order, its coordinates along the shared ones."""
        for place in itertools.product(*(range(plan.axis_sizes[axis]) for axis in axes)):
            along = dict(zip(axes, place, strict=True))
            yield tuple(along[axis] for axis in shared)

    prefill = list(places(theirs))
    return tuple(tuple(number for number, other in enumerate(prefill) if other == place) for place in places(ours))


def smallest_first(buckets: Iterable[Bucket]) -> tuple[Bucket, ...]:
    """The order in which `fit` tries them."""
    return tuple(sorted(buckets, key=lambda bucket: (bucket.num_tokens, bucket.prefill_pages, bucket.decode_pages)))


def wanted_by(plan: Plan, prompt_lens: Sequence[int], max_tokens: int) -> tuple[Bucket, ...]:
    """The buckets, smallest first, that an engine needs to answer prompts of these lengths and no others, with up to so many tokens each.

    Short of preemption no step is larger; one that is compiles its bucket when it comes.
    """
    limits, buckets = runner_limits(plan), smallest_first(plan.buckets)
    longest, share = max(prompt_lens), limits.max_prefill_tokens_per_shard
    decode = Bucket(min(len(prompt_lens), limits.num_shards), limits.pages_for(min(longest + max_tokens, limits.max_len)))
    fullest = min(sum(prompt_lens), share)  # all of them may lie on one shard
    prompts = replace(decode, prefill_tokens=fullest * limits.num_prefill_shards, prefill_slots=limits.num_prefill_shards)
    most = [decode, prompts, *([replace(prompts, prefill_pages=limits.pages_for(longest))] if longest > share else [])]
    largest = [next((bucket for bucket in buckets if bucket.holds(each)), buckets[-1]) for each in most]

    def reached(bucket: Bucket, by: Bucket) -> bool:
        sizes = ("decode_pages", "prefill_tokens", "prefill_pages")
        return bool(bucket.prefill_tokens) == bool(by.prefill_tokens) and all(getattr(bucket, name) <= getattr(by, name) for name in sizes)

    return tuple(bucket for bucket in buckets if any(reached(bucket, by) for by in largest))


def fit(buckets: Sequence[Bucket], limits: RunnerLimits, *steps: Step) -> Bucket:
    """The bucket in which a step runs, or a tick of which each stage holds one of the steps: the first that holds every one of them.

    Rows lie in equal blocks per decode shard, prompt tokens and slots in equal blocks per prefill shard, so the fullest shard counts.

    Args:
        buckets: smallest first.

    Raises:
        InvalidInput: none holds them.
    """
    needed = _needed(limits, steps)
    for bucket in buckets:
        if bucket.holds(needed):
            return bucket
    raise InvalidInput(f"no bucket holds {needed}; there are: " + " | ".join(map(str, buckets)))


def _needed(limits: RunnerLimits, steps: tuple[Step, ...]) -> Bucket:
    """The sizes that a bucket must have at least to hold each of the steps."""
    shards, prefill_shards = limits.num_shards, limits.num_prefill_shards
    fullest, latest, most_tokens, most_slots, earlier = 0, -1, 0, 0, 0
    for step in steps:
        per_shard = [0] * shards
        for row in step.decode:
            per_shard[row.shard] += 1
            latest = max(latest, row.position)
        tokens, slots = [0] * prefill_shards, [0] * prefill_shards
        for chunk in step.prefill:
            tokens[chunk.prefill_shard] += len(chunk.tokens)
            slots[chunk.prefill_shard] += 1
            earlier = max(earlier, chunk.start)
        fullest, most_tokens, most_slots = max(fullest, *per_shard), max(most_tokens, *tokens), max(most_slots, *slots)
    how = [row.sampling for step in steps for row in step.decode] + [chunk.sampling for step in steps for chunk in step.prefill]
    return Bucket(
        decode_rows=fullest * shards,
        decode_pages=limits.pages_for(latest + 1),
        prefill_tokens=most_tokens * prefill_shards,
        prefill_slots=most_slots * prefill_shards,
        prefill_pages=limits.pages_for(earlier),
        random=not all(each.greedy for each in how),
        extended=any(each.extended for each in how) or any(chunk.targets for step in steps for chunk in step.prefill),
        constrained=any(row.mask is not None for step in steps for row in step.rows),
    )
