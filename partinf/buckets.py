"""How large the steps of a plan are: the KV pages and the few padded shapes that are compiled before anything is served, what a step may
hold in all of them, and which of them a step runs in. Both the runner and the simulator ask here.

The pages are those that fit in memory after weights, programs and the activations of these steps (`held`), whatever the sequences that run
together would take at full length: more of them are taken than fit so, and a scheduler preempts or swaps some when pages run out.

A bucket costs a compilation and its padding costs time at every step, so there are few: decode alone, decode with prompts that begin
in this step, and, where a prompt may be longer than one step's share, decode with chunks that read earlier pages. Each comes with two or
three lengths of context when they differ enough to matter. Prompts that begin have a smaller bucket too, where its step takes much
less time: where it is bound by compute and not by reading the weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from partinf.cost.calibration import ROOFLINE, calibration_for
from partinf.cost.memory import Held, Room, activation_bytes, page_bytes, slot_bytes, usable_bytes, weight_bytes
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED
from partinf.cost.split import Shares, StepShape, StepSplit
from partinf.cost.step import step_ledger
from partinf.engine.runner import PageGroup, RunnerLimits
from partinf.engine.step import Step
from partinf.foundation.errors import DoesNotFit, InvalidInput, raise_offences
from partinf.foundation.limits import MAX_BATCH, MAX_LEN, MAX_PAGES, not_whole, outside
from partinf.foundation.paging import PAGE_SIZE, chunk_pages, window_pages
from partinf.foundation.rounding import ceil_div, round_up
from partinf.layout import AttentionRole
from partinf.plans import Bucket, CacheConfig, CacheGroup, Plan
from partinf.workload import SERVED_PROMPT_TOKENS, Workload

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
_SHORT_CONTEXT = 4  # a second set of buckets reads this fraction of the longest context
_SHORT_PAGES = 128  # from four times as many on there is a third set, which reads so many at most
PROMPT_TOKENS = 512  # prompt tokens per step unless a capacity says otherwise: enough to be limited by compute on every chip
_LARGEST_SHARE = 0.9  # of memory that is left, for pages of one sequence
_WORTH_A_COMPILATION = 0.8  # of the time of the step without the smaller bucket


@dataclass(frozen=True)
class Capacity:
    """What an engine should hold at once.

    Attributes:
        max_rows: sequences decoded together, those of all pipeline stages, rounded up to what the plan's axes divide.
        max_len: longest context in tokens, prompt and output together; 0 takes the model's, or what the pages hold of one sequence if that
            is less.
        prefill_tokens: prompt tokens per step, rounded up likewise.
        page_size: tokens per KV page.
        random: whether requests may sample; False compiles greedy selection alone.
        extended: whether requests may use extended sampling: penalties, logit biases, `top_logprobs` and log-probabilities of their
            prompts. The programs are as many and larger; every slot keeps counts and biases of the whole vocabulary on the devices.
        constrained: whether requests may be held to a grammar, by a mask of the tokens that may come next.
        max_prompt_len: longest prompt that will come; one step then holds such a prompt whole on every shard that prefills. 0: any prompt
            may come, and those that are longer than a shard's share of a step are cut over several.
        max_residents: sequences that may hold pages, where some policy gives one's place to another; 0 for those decoded together.
        kv_pages: pages per shard; 0 for as many as memory holds.
        memory_share: share of the memory left by weights, programs and activations that becomes pages; 0 for the platform's.
    """

    max_rows: int = 32
    max_len: int = 0
    prefill_tokens: int = 128
    page_size: int = PAGE_SIZE
    random: bool = True
    extended: bool = False
    constrained: bool = False
    max_prompt_len: int = 0
    max_residents: int = 0
    kv_pages: int = 0
    memory_share: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of one step on one shard that prefills."""
        return max(self.prefill_tokens, self.max_prompt_len)


def capacity_for(plan: Plan, workload: Workload) -> Capacity:
    """What an engine for this workload should hold."""
    needed = max(workload.max_context, 1)
    longest = min(needed, plan.model.longest_context or needed)
    return Capacity(max_rows=workload.batch, max_len=longest, prefill_tokens=_prompt_tokens(workload, plan.num_stages))


def served_capacity(rows: int, max_len: int, prompt_tokens: int = SERVED_PROMPT_TOKENS) -> Capacity:
    """What a server holds that takes whatever a request may ask for.

    Args:
        max_len: longest context; 0 for the model's. prompt_tokens: per step.
    """
    prompts = min(prompt_tokens, max_len or prompt_tokens)
    return Capacity(max_rows=rows, max_len=max_len, prefill_tokens=prompts, extended=True, constrained=True)


def _prompt_tokens(workload: Workload, num_stages: int) -> int:
    """Prompt tokens per step. With stages a tick is as long as its longest step, so every step takes what a steady batch sees of them."""
    if num_stages == 1 or not workload.output_len:
        return min(max(workload.input_len, 1), PROMPT_TOKENS)
    share = ceil_div(workload.batch * workload.input_len, workload.output_len * num_stages)
    return min(max(share, 1), PROMPT_TOKENS)


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
    sized = replace(plan, max_len=max_len, cache=cache, buckets=_buckets(plan, capacity, rows, max_len))
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


def code_bytes(plan: Plan, bucket: Bucket) -> int:
    """Of the program of one bucket, on each device."""
    layers, tokens = plan.model.num_layers if plan.unrolled else 0, ceil_div(bucket.prefill_tokens, plan.prefill_slot_multiple())
    return plan.slice.chip.platform.program_bytes(bucket.decode_rows, tokens, layers)


def rows_per_stage(plan: Plan, sequences: int) -> int:
    """Decode rows of a step when so many sequences are decoded together: those of one stage's batch, padded to what the axes divide."""
    return plan.decode_rows(ceil_div(sequences, plan.num_stages))


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


def num_programs(workload: Workload) -> int:
    """Steps that an engine for this workload compiles, by which it decides whether layers are compiled one by one; of one phase, one.

    Not counted is the smaller bucket of prompts, which some layouts have in addition (`_smaller`).
    """
    if workload.phase is not None:
        return 1
    longest = max(workload.max_context, 1)
    chunked = longest - 1 > _prompt_tokens(workload, num_stages=1)
    return len(_contexts(ceil_div(longest, CacheConfig().page_size))) * (2 + chunked)


def least_rows(plan: Plan) -> int:
    """Decode lanes below which a step gains nothing: XLA makes the product of a matrix and one row a sum over its columns, which takes
    several times as long as two rows on some platforms."""
    return 2 if plan.weights in plan.slice.chip.platform.slow_single_row else 1


def _buckets(plan: Plan, capacity: Capacity, rows: int, max_len: int) -> tuple[Bucket, ...]:
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
