"""The padded shapes that a plan compiles before anything is served.

A bucket costs a compilation and its padding costs time at every step, so there are few: decode alone, decode with prompts that begin
in this step, and, where a prompt may be longer than one step's share, decode with chunks that read earlier pages. Each comes with two or
three lengths of context when they differ enough to matter. Prompts that begin have a smaller bucket too, where its step takes much
less time: where it is bound by compute and not by reading the weights.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from partinf.buckets.capacity import Capacity, prompt_tokens_of
from partinf.cost.calibration import calibration_for
from partinf.cost.pricing import Pricing
from partinf.cost.split import Shares, StepShape, StepSplit
from partinf.cost.step import step_ledger
from partinf.foundation.rounding import ceil_div, round_up
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.workload import Workload

_SHORT_CONTEXT = 4  # a second set of buckets reads this fraction of the longest context
_SHORT_PAGES = 128  # from four times as many on there is a third set, which reads so many at most
_WORTH_A_COMPILATION = 0.8  # of the time of the step without the smaller bucket


def shape_of(bucket: Bucket, page_size: int) -> StepShape:
    """The padded shape of a bucket as the cost model takes it."""
    return StepShape(
        decode_rows=bucket.decode_rows,
        decode_context=bucket.decode_pages * page_size,
        prefill_tokens=bucket.prefill_tokens,
        prefill_slots=bucket.prefill_slots,
        prefill_context=bucket.prefill_pages * page_size,
        page_size=page_size,
        sampling=bucket.random,
        extended=bucket.extended,
        constrained=bucket.constrained,
    )


def split_of(plan: Plan, bucket: Bucket, pricing: Pricing) -> StepSplit:
    """The plan's roles worked out for a bucket at its padded shape, in the program that an engine of this plan compiles."""
    model, phase, shape = plan.padded_model, plan.ffn_phase(bucket.num_tokens), shape_of(bucket, plan.cache.page_size)
    shares = Shares(heads=plan.model.num_heads / model.num_heads)
    return StepSplit(model, plan.layout, phase, shape, pricing.compiled(plan.unrolled), plan.weights, plan.kv, shares)


def rows_per_stage(plan: Plan, sequences: int) -> int:
    """Decode rows of a step when so many sequences are decoded together: those of one stage's batch, padded to what the axes divide."""
    return plan.decode_rows(ceil_div(sequences, plan.num_stages))


def least_rows(plan: Plan) -> int:
    """Decode lanes below which a step gains nothing: XLA makes the product of a matrix and one row a sum over its columns, which takes
    several times as long as two rows on some platforms."""
    return 2 if plan.weights in plan.slice.chip.platform.slow_single_row else 1


def num_programs(workload: Workload) -> int:
    """Steps that an engine for this workload compiles, by which it decides whether layers are compiled one by one; of one phase, one.

    Not counted is the smaller bucket of prompts, which some layouts have in addition (`_smaller`).
    """
    if workload.phase is not None:
        return 1
    longest = max(workload.max_context, 1)
    chunked = longest - 1 > prompt_tokens_of(workload, num_stages=1)
    return len(_contexts(ceil_div(longest, CacheConfig().page_size))) * (2 + chunked)


def buckets_for(plan: Plan, capacity: Capacity, rows: int, max_len: int) -> tuple[Bucket, ...]:
    pages = ceil_div(max_len, capacity.page_size)
    shards = plan.prefill_slot_multiple()
    tokens = round_up(max(capacity.prefill_tokens, capacity.max_prompt_len * shards), plan.prefill_token_multiple())
    slots = round_up(min(8, rows), shards)
    sets: list[list[Bucket]] = []
    for context in _contexts(pages):
        lanes_read, slots_read = round_up(context, plan.num_sequence_shards), round_up(context, plan.prefill_page_multiple())
        kinds = {"random": capacity.random or capacity.extended, "extended": capacity.extended, "constrained": capacity.constrained}
        decode = Bucket(rows, lanes_read, **kinds)
        full = replace(decode, decode_rows=round_up(rows, plan.decode_row_multiple()), prefill_tokens=tokens, prefill_slots=slots)
        sets.append([decode, full])
        if not capacity.max_prompt_len and max_len - 1 > tokens // shards:
            sets[-1].append(replace(full, prefill_pages=slots_read))
    together = replace(plan, buckets=tuple(itertools.chain(*sets)))
    return tuple(bucket for decode, full, *rest in sets for bucket in (decode, *_smaller(together, full), full, *rest))


def _contexts(pages: int) -> list[int]:
    """Pages that lanes read, in each set of buckets: all of them; a part, where that is worth a compilation; and in very long contexts
    those of ordinary requests, for a step costs the more the more pages it may read, on the host too."""
    if pages <= 4 * _SHORT_CONTEXT:
        return [pages]
    if pages < _SHORT_CONTEXT * _SHORT_PAGES:
        return sorted({ceil_div(pages, _SHORT_CONTEXT), pages})
    short = min(_SHORT_PAGES, pages // _SHORT_CONTEXT**2)
    return [short, math.isqrt(short * pages), pages]


def _smaller(plan: Plan, full: Bucket) -> tuple[Bucket, ...]:
    """The bucket with half the prompt tokens, or else a quarter, if one is worth its compilation by the cost model, besides the plan's.
    Pipeline stages pass on the same rows in every bucket, so theirs have one size."""
    if plan.num_stages > 1:
        return ()
    pricing = Pricing(plan.slice, calibration_for(plan.slice.chip))

    def seconds(bucket: Bucket) -> float:
        return step_ledger(split_of(plan, bucket, pricing)).seconds

    most = _WORTH_A_COMPILATION * seconds(full)
    for part in (2, 4):
        smaller = replace(full, prefill_tokens=round_up(full.prefill_tokens // part, plan.prefill_token_multiple()))
        if seconds(smaller) <= most:
            return (smaller,)
    return ()


def code_bytes(plan: Plan, bucket: Bucket) -> int:
    """Of the program of one bucket, on each device."""
    layers, tokens = plan.model.num_layers if plan.unrolled else 0, ceil_div(bucket.prefill_tokens, plan.prefill_slot_multiple())
    return plan.slice.chip.platform.program_bytes(bucket.decode_rows, tokens, layers)
