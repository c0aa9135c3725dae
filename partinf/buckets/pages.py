"""How many KV pages a plan has: those that fit in memory after weights, programs and the activations of its steps (`held`).

Sequences that run together would take more at full length, so a scheduler preempts or swaps some when pages run out.
"""

from __future__ import annotations

from dataclasses import replace

from partinf.buckets.capacity import Capacity
from partinf.buckets.shapes import buckets_for, code_bytes, least_rows, rows_per_stage, split_of
from partinf.cost.calibration import ROOFLINE
from partinf.cost.memory import Held, Room, activation_bytes, page_bytes, slot_bytes, usable_bytes, weight_bytes
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED
from partinf.foundation.errors import DoesNotFit, raise_offences
from partinf.foundation.limits import MAX_BATCH, MAX_LEN, MAX_PAGES, not_whole, outside
from partinf.foundation.paging import chunk_pages, window_pages
from partinf.foundation.rounding import ceil_div, round_up
from partinf.layout import AttentionRole
from partinf.plans import Bucket, CacheConfig, CacheGroup, Plan
from partinf.workload import Workload

_RANGES = {
    "max_rows": (1, MAX_BATCH),
    "max_len": (0, MAX_LEN),
    "prefill_tokens": (1, MAX_LEN),
    "page_size": (1, MAX_LEN),
    "max_prompt_len": (0, MAX_LEN),
    "max_residents": (0, MAX_BATCH),
    "kv_pages": (0, MAX_PAGES),
}
_UNKNOWN_CONTEXT = 4096  # of models that name none
_LARGEST_SHARE = 0.9  # of memory that is left, for pages of one sequence


def with_capacity(plan: Plan, capacity: Capacity, *, beyond: bool = False) -> Plan:
    """The plan with cache and buckets for this capacity.

    Args:
        beyond: take contexts beyond the model's, where only sizes are requested.

    Raises:
        InvalidInput: sizes out of range, or a context beyond the model's.
        DoesNotFit: memory does not hold one sequence.
    """
    raise_offences(_capacity_offences(plan, capacity))
    if not beyond:
        raise_offences(plan.model.context_offences(f"max_len = {capacity.max_len}", capacity.max_len))
    longest = capacity.max_len or plan.model.longest_context or _UNKNOWN_CONTEXT
    sized = _with_pages(plan, capacity, longest)
    while (holds := _longest_held(sized)) < longest:
        if capacity.max_len or not holds:
            raise DoesNotFit(_no_room(sized, longest))
        # Steps that read less take no more, so that what holds this length holds it still; unless windows hold it too, and are none.
        alike = len(plan.model.kept_windows(holds)) == len(sized.cache_groups)
        longest = holds
        sized = _with_pages(plan, replace(capacity, kv_pages=sized.cache.pages_per_shard) if alike else capacity, longest)
    return sized


def _longest_held(plan: Plan) -> int:
    """Positions of the longest sequence that the pages of one shard hold; 0 where a window does not hold its own."""
    first, *windows = plan.cache_groups
    for group in (first, *windows) if first.window else windows:
        if group.pages_per_shard < plan.num_sequence_shards * sum(_window_pages(plan, group.window)):
            return 0
    return plan.max_len if first.window else first.pages_per_shard * plan.cache.page_size


def _window_pages(plan: Plan, window: int, positions: int = 0) -> tuple[int, int]:
    """Pages per sequence shard of a window that one sequence of so many positions, `max_len` if not given, keeps at most between two
    steps, and those that prompts of one step take in addition."""
    size, ways = plan.cache.page_size, plan.num_sequence_shards
    shared = plan.ways(tuple(axis for axis in plan.batch_axes if axis in plan.layout.prefill.attention_axes(AttentionRole.BATCH)))
    tokens, slots = (max(getattr(bucket, name) for bucket in plan.buckets) for name in ("prefill_tokens", "prefill_slots"))
    return window_pages(window, positions or plan.max_len, size, ways), chunk_pages(tokens // shared, slots // shared, size, ways)


def with_window_pages(plan: Plan, residents: int, positions: int) -> Plan:
    """The plan with as many pages of windows as so many sequences per shard, of so many positions each, need with the prompts of one step;
    `plan` has buckets."""
    kept = [window for window, _ in plan.model.kept_windows(plan.max_len)]
    found = [_window_pages(plan, window, positions) for window in kept if window]
    pages = [plan.num_sequence_shards * (residents * own + more) for own, more in found]
    pages = pages if kept[0] else [plan.cache.pages_per_shard, *pages]
    return replace(plan, cache=replace(plan.cache, pages_per_shard=pages[0], other_pages=tuple(pages[1:])))


def _capacity_offences(plan: Plan, capacity: Capacity) -> list[str]:
    offences = [line for name, (low, high) in _RANGES.items() for line in not_whole(name, getattr(capacity, name), low, high)]
    offences += outside("memory_share", capacity.memory_share, 0, 1)
    if offences:
        return offences
    if capacity.kv_pages % plan.num_sequence_shards:
        offences.append(
            f"kv_pages = {capacity.kv_pages}; a multiple of {plan.num_sequence_shards} is needed: so many sequence shards hold its pages"
        )
    return offences + outside("KV pages of all shards", capacity.kv_pages * plan.num_shards, 0, MAX_PAGES)


def _with_pages(plan: Plan, capacity: Capacity, max_len: int) -> Plan:
    """The plan with the buckets for sequences of this length, and as many pages as still fit in memory; perhaps none."""
    rows = rows_per_stage(plan, max(capacity.max_rows, least_rows(plan)))
    slots = max(rows * plan.num_stages, capacity.max_residents)
    cache = CacheConfig(capacity.page_size, plan.num_sequence_shards, slots)
    sized = replace(plan, max_len=max_len, cache=cache, buckets=buckets_for(plan, capacity, rows, max_len))
    first, *others = (pages * plan.num_sequence_shards for pages in _pages_that_fit(sized, capacity))
    return replace(sized, cache=replace(cache, pages_per_shard=first, other_pages=tuple(others)))


def _pages_that_fit(plan: Plan, capacity: Capacity) -> tuple[int, ...]:
    """Pages per sequence shard of one shard, of every group of the cache: those of the share requested, otherwise of the platform's,
    and more if one sequence needs more. On virtual devices, which share the machine's memory with all that runs on it, no more than the
    sequences that may hold pages can fill."""
    platform, found, groups = plan.slice.chip.platform, held(plan), plan.cache_groups
    residents = max(rows_per_stage(plan, capacity.max_rows) * plan.num_stages, capacity.max_residents)
    each = ceil_div(residents, plan.num_shards)
    windows = [_window_pages(plan, group.window) for group in groups if group.window]
    one = 0 if groups[0].window else ceil_div(ceil_div(plan.max_len, capacity.page_size), plan.num_sequence_shards)
    if capacity.kv_pages:
        first = capacity.kv_pages // plan.num_sequence_shards
        of_use = max(1, min([each, *(first // own for own, _ in windows)]))
        more = [of_use * own + chunk for own, chunk in windows]
        return (first, *(more if one else more[1:]))
    pages = found.room.divided(capacity.memory_share or platform.memory_share, found.page_bytes, windows, each, one)
    if capacity.max_len and not capacity.memory_share and (pages[0] < one or not pages[-1]):
        larger = found.room.divided(_LARGEST_SHARE, found.page_bytes, windows, each, one)
        pages = (max(pages[0], min(one, larger[0])), *larger[1:]) if one else larger
    most = MAX_PAGES // (plan.num_shards * plan.num_sequence_shards)
    needed = [each * own + more for own, more in windows]
    bounds = ([each * one, *needed] if one else needed) if platform.virtual else [most] * len(pages)
    return tuple(min(count, bound, most) for count, bound in zip(pages, bounds, strict=True))


def _no_room(plan: Plan, longest: int) -> str:
    """Why memory does not hold one sequence of this length."""
    room, tokens = held(plan).room, _longest_held(plan)
    others = f"weights {room.weights / 1e9:.1f} + programs and slots {(room.code + room.state) / 1e9:.1f}"
    return (
        f"model {plan.model.name} does not fit {plan.slice.name}: {others} + activations {room.activations / 1e9:.1f} GB, of "
        f"{room.usable / 1e9:.1f} GB per device, leave room for {tokens} tokens of KV per shard, and one request of {longest} tokens "
        f"needs more; a larger slice, int8, a shorter context or a larger share of memory would help"
    )


def largest_step(plan: Plan) -> Bucket:
    """The bucket whose activations take most memory; of several, the one that reads most pages."""
    pricing = Pricing(plan.slice, ROOFLINE, program=TILED)

    def size(bucket: Bucket) -> tuple[int, int, int]:
        return activation_bytes(split_of(plan, bucket, pricing)), bucket.prefill_pages, bucket.decode_pages

    return max(plan.buckets, key=size)


def held(plan: Plan) -> Held:
    """What one device holds of an engine of this plan, by the one account that every command takes."""
    pricing = Pricing(plan.slice, ROOFLINE, program=TILED)
    splits = [split_of(plan, bucket, pricing) for bucket in plan.buckets]
    vocabulary = plan.model.padded_vocab_size // plan.ways(plan.layout.weight_axes)
    room = Room(
        usable=usable_bytes(plan.slice),
        weights=weight_bytes(splits[0]),
        code=sum(code_bytes(plan, bucket) for bucket in plan.buckets),
        state=slot_bytes(vocabulary, plan.extended, plan.constrained) * plan.cache.num_slots,
        activations=max(map(activation_bytes, splits)),
    )
    cache, groups = plan.cache, plan.cache_groups
    tokens = groups[0].pages_per_shard * plan.num_shards * cache.page_size
    return Held(
        room,
        group_page_bytes(plan),
        tuple(group.pages_per_shard // plan.num_sequence_shards for group in groups),
        tokens,
        tuple(group.window for group in groups),
        tuple(_peak(plan, group) for group in groups),
    )


def group_page_bytes(plan: Plan) -> tuple[int, ...]:
    """Bytes of a page of every group of the cache, on one device that has it."""
    model, size = plan.padded_model, plan.cache.page_size
    return tuple(page_bytes(model, plan.layout, plan.slice, plan.kv, size, len(group.layers)) for group in plan.cache_groups)


def _peak(plan: Plan, group: CacheGroup) -> tuple[int, int]:
    """Pages per sequence shard that one sequence takes while the longest chunk of its prompt is computed, and those that it
    keeps after that."""
    size, ways = plan.cache.page_size, plan.num_sequence_shards
    if not group.window:
        return (ceil_div(ceil_div(plan.max_len, size), ways),) * 2
    chunk = max(1, max(bucket.prefill_tokens for bucket in plan.buckets) // plan.prefill_slot_multiple())
    own = window_pages(group.window, plan.max_len, size, ways)
    return window_pages(group.window - 1 + chunk, plan.max_len, size, ways), own


def serving_steps(plan: Plan, workload: Workload) -> tuple[Plan, tuple[Bucket, ...]]:
    """The plan with a cache for the workload, and the steps that serve it: decode of the whole batch, then prefill of as many prompts as
    one step takes; one of them where the workload is one phase."""
    size = plan.cache.page_size
    rows, held = (rows_per_stage(plan, batch) for batch in (max(workload.batch, least_rows(plan)), workload.batch))
    pages = round_up(ceil_div(max(workload.max_context, workload.decode_context, 1), size), plan.num_sequence_shards)
    buckets = []
    if workload.phase != "prefill":
        buckets.append(Bucket(rows, round_up(ceil_div(max(workload.decode_context, 1), size), plan.num_sequence_shards)))
    if workload.phase != "decode":
        prompts = ceil_div(min(workload.prefill_batch or workload.batch, workload.batch), plan.num_stages)
        slots = round_up(prompts, plan.prefill_slot_multiple())
        tokens = round_up(slots * workload.input_len, plan.prefill_token_multiple())  # every slot holds a whole prompt
        buckets.append(Bucket(prefill_tokens=tokens, prefill_slots=slots))
    lanes = held * plan.num_stages // plan.num_shards
    cache = CacheConfig(size, lanes * pages, rows * plan.num_stages)
    switch = 1 if workload.phase == "prefill" else plan.prefill_from_tokens
    if workload.phase is None:
        switch = min(switch, max(rows + 1, 2))
    sized = replace(plan, cache=cache, max_len=max(plan.max_len, pages * size), prefill_from_tokens=switch)
    windows = with_window_pages(replace(sized, buckets=tuple(buckets)), lanes, pages * size).cache
    return replace(sized, cache=windows), tuple(buckets)
