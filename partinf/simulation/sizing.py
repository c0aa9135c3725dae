"""How large a simulated engine is, and the runner of that size: with as many KV pages as its devices have room for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from partinf.buckets import Capacity, held, runner_limits, with_capacity
from partinf.cost.pricing import Pricing
from partinf.foundation.errors import raise_offences
from partinf.foundation.limits import MAX_BATCH, MAX_HOST_BYTES, MAX_LEN, MAX_PAGES, MAX_SECONDS, not_whole, outside
from partinf.foundation.rounding import ceil_div, round_up
from partinf.plans import Bucket, Plan
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
        host_bytes: host memory per chip for swapped pages. kv_pages, memory_share: as of `Capacity`. Neither memory has more pages than a
            pool keeps (`limits.MAX_PAGES`, of all shards together).
        extended: its programs support extended sampling and constraints, as a server's do.
        overhead_seconds: added to every iteration for the host.
    """

    max_rows: int = 64
    max_residents: int = 0
    max_len: int = 2048
    prefill_tokens: int = 4096
    page_size: int = 16
    host_bytes: float = 0.0
    kv_pages: int = 0
    memory_share: float = 0.0
    extended: bool = True
    overhead_seconds: float = 0.0

    def __post_init__(self) -> None:
        offences = [line for name, (low, high) in _RANGES.items() for line in not_whole(name, getattr(self, name), low, high)]
        offences += outside("host_bytes", self.host_bytes, 0, MAX_HOST_BYTES)
        offences += outside("memory_share", self.memory_share, 0, 1)
        offences += outside("overhead_seconds", self.overhead_seconds, 0, MAX_SECONDS)
        raise_offences(offences)


def cost_runner(plan: Plan, pricing: Pricing, sizing: Sizing) -> tuple[CostRunner, StepPrice]:
    """A runner that simulates this plan, with the KV pages that an engine of this size has on its devices.

    Raises:
        InvalidInput: more pages than a pool keeps, weights that leave no room for one sequence of the longest context.
    """
    sized = sized_plan(plan, sizing)
    price, chip = StepPrice(sized, pricing), plan.slice.chip
    most = MAX_PAGES // (plan.num_shards * plan.num_sequence_shards)  # of one sequence shard
    longest = [own for _, own in held(sized).peak]  # host memory holds as many of the longest sequences of every group
    of_all = sum(own * size for own, size in zip(longest, price.page_bytes, strict=True))
    room = int(sizing.host_bytes / chip.devices_per_chip)
    host_pages = tuple(min(room * own // of_all, most) * plan.num_shards * plan.num_sequence_shards for own in longest)
    limits = runner_limits(_with_one_bucket(sized, sizing), *host_pages)
    sizes = tuple(size / price.page_bytes[0] for size in price.page_bytes)
    overhead, page_seconds = sizing.overhead_seconds, (price.page_seconds,) * 2
    return CostRunner(limits, price, overhead_seconds=overhead, page_seconds=page_seconds, page_sizes=sizes), price


def sized_plan(plan: Plan, sizing: Sizing) -> Plan:
    """The plan as an engine of this size has it; `partinf.buckets.held` says what its devices hold.

    Raises:
        InvalidInput: as `cost_runner`.
    """
    capacity = Capacity(
        max_rows=sizing.max_rows,
        max_len=sizing.max_len,
        prefill_tokens=sizing.prefill_tokens,
        page_size=sizing.page_size,
        extended=sizing.extended,
        constrained=sizing.extended,
        max_residents=sizing.max_residents,
        kv_pages=sizing.kv_pages,
        memory_share=sizing.memory_share,
    )
    return with_capacity(plan, capacity, beyond=True)


def _with_one_bucket(plan: Plan, sizing: Sizing) -> Plan:
    """The plan with one bucket, which holds all that a step may hold: steps are priced at their own shapes, not at its. Where windows have
    pages for the prompts of one step, these are as many as in the plan's own."""
    rows, prefill_shards = round_up(sizing.max_rows, plan.num_shards), plan.prefill_slot_multiple()
    slots = max(bucket.prefill_slots for bucket in plan.buckets) if len(plan.cache_groups) > 1 else rows * prefill_shards
    largest = Bucket(
        decode_rows=rows,
        decode_pages=ceil_div(sizing.max_len, sizing.page_size),
        prefill_tokens=round_up(sizing.prefill_tokens, prefill_shards),
        prefill_slots=slots,
        prefill_pages=ceil_div(sizing.max_len, sizing.page_size),
        random=True,
        extended=True,
    )
    return replace(plan, buckets=(largest,))
