"""How large a simulated engine is, and the runner of that size: with as many KV pages as its devices have room for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from partinf.buckets import runner_limits
from partinf.cost.memory import activation_bytes, usable_bytes
from partinf.cost.pricing import Pricing
from partinf.cost.split import StepShape, StepSplit
from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.foundation.limits import MAX_BATCH, MAX_HOST_BYTES, MAX_LEN, MAX_PAGES, MAX_SECONDS, not_whole, outside
from partinf.foundation.rounding import ceil_div, round_up
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.simulation.cost_runner import CostRunner
from partinf.simulation.step_price import StepPrice

_RANGES = {
    "max_rows": (1, MAX_BATCH),
    "max_residents": (0, MAX_BATCH),
    "max_len": (1, MAX_LEN),
    "prefill_tokens": (1, MAX_LEN),
    "page_size": (1, MAX_LEN),
    "kv_pages": (0, MAX_PAGES),
}


@dataclass(frozen=True)
class Sizing:
    """How large the simulated engine is.

    Attributes:
        max_rows: sequences decoded by one step. max_residents: sequences that may hold pages; 0 for those of as many steps as there are
            pipeline stages.
        max_len: longest context. prefill_tokens: prompt tokens per step. page_size: tokens per KV page.
        host_bytes: host memory per chip for swapped pages. kv_pages: pages per shard; 0 takes what memory is left. Neither memory has
            more pages than a pool keeps (`limits.MAX_PAGES`, of all shards together).
        overhead_seconds: added to every iteration for the host.
    """

    max_rows: int = 64
    max_residents: int = 0
    max_len: int = 2048
    prefill_tokens: int = 4096
    page_size: int = 16
    host_bytes: float = 0.0
    kv_pages: int = 0
    overhead_seconds: float = 0.0

    def __post_init__(self) -> None:
        offences = [line for name, (low, high) in _RANGES.items() for line in not_whole(name, getattr(self, name), low, high)]
        offences += outside("host_bytes", self.host_bytes, 0, MAX_HOST_BYTES)
        offences += outside("overhead_seconds", self.overhead_seconds, 0, MAX_SECONDS)
        raise_offences(offences)


def cost_runner(plan: Plan, pricing: Pricing, sizing: Sizing) -> tuple[CostRunner, StepPrice]:
    """A runner that simulates this plan, with a pool of as many KV pages as its devices have room for.

    Raises:
        InvalidInput: more pages than a pool keeps, weights that leave no room for one sequence of the longest context, or a context beyond
            the model's sliding window.
    """
    if plan.model.window:
        raise_offences(plan.model.context_offences(f"max_len = {sizing.max_len}", sizing.max_len))
    plan = _sized(plan, sizing)
    price = StepPrice(plan, pricing)
    chip, page_bytes, page_seconds = plan.slice.chip, price.page_bytes, price.page_seconds
    raise_offences(outside("KV pages of all shards", sizing.kv_pages * plan.num_shards, 0, MAX_PAGES))
    most = MAX_PAGES // (plan.num_shards * plan.num_parts)  # of one part of a shard
    pages = sizing.kv_pages or min(int(_free_bytes(plan, pricing, price, sizing) // page_bytes), most) * plan.num_parts
    if pages * sizing.page_size < sizing.max_len:
        raise InvalidInput(
            f"model {plan.model.name} on {plan.slice.name}: beside the weights there is room for {max(pages, 0) * sizing.page_size} tokens "
            f"of KV per shard, and one request of {sizing.max_len} tokens needs more; a larger slice, int8 or a shorter context would help"
        )
    plan = replace(plan, cache=replace(plan.cache, pages_per_shard=pages))
    host_pages = min(int(sizing.host_bytes / chip.devices_per_chip // page_bytes), most) * plan.num_shards * plan.num_parts
    limits = runner_limits(plan, host_pages)
    return CostRunner(limits, price, overhead_seconds=sizing.overhead_seconds, page_seconds=(page_seconds, page_seconds)), price


def _sized(plan: Plan, sizing: Sizing) -> Plan:
    """The plan with one bucket, which holds all that a step may hold: steps are priced at their own shapes, not at its. Pages are still to
    be counted."""
    rows, prefill_shards = round_up(sizing.max_rows, plan.num_shards), plan.prefill_slot_multiple()
    largest = Bucket(
        decode_rows=rows,
        decode_pages=ceil_div(sizing.max_len, sizing.page_size),
        prefill_tokens=round_up(sizing.prefill_tokens, prefill_shards),
        prefill_slots=rows * prefill_shards,
        prefill_pages=ceil_div(sizing.max_len, sizing.page_size),
        random=True,
        rich=True,
    )
    slots = max(rows * plan.num_stages, sizing.max_residents)
    return replace(plan, max_len=sizing.max_len, cache=CacheConfig(sizing.page_size, plan.num_parts, slots), buckets=(largest,))


def _free_bytes(plan: Plan, pricing: Pricing, price: StepPrice, sizing: Sizing) -> float:
    """Memory of one device beside its weights and the activations of the largest step."""
    rows = round_up(sizing.max_rows, plan.decode_row_multiple())
    tokens = round_up(sizing.prefill_tokens, plan.prefill_token_multiple())
    slots = round_up(max(1, sizing.prefill_tokens // sizing.max_len), plan.prefill_slot_multiple())
    shape = StepShape(decode_rows=rows, decode_context=sizing.max_len, prefill_tokens=tokens, prefill_slots=slots)
    phase = plan.ffn_phase(shape.num_tokens)
    split = StepSplit(plan.padded_model, plan.layout, phase, shape, pricing, plan.weights, plan.kv, price.shares)
    return usable_bytes(plan.slice) - price.weight_bytes() - activation_bytes(split)
