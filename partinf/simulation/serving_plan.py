"""A layout for serving: chosen for the iterations that requests make of themselves, a full batch that decodes and now and then a prompt.

The planner judges the prefill of a whole batch of prompts, which it may deal over the axes. Requests come one by one, and a single prompt
would be padded to every shard that prompts are dealt over. So the planner's best are judged again, with prompts that are split by heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from partinf.cost.movement import ways
from partinf.cost.pricing import Pricing
from partinf.foundation.errors import InvalidInput
from partinf.foundation.limits import NEVER
from partinf.foundation.rounding import ceil_div
from partinf.hardware.slices import Slice
from partinf.layout import AttentionRole, Layout, Role
from partinf.model.config import ModelConfig
from partinf.planner.choose import misfit, plan_of, with_fewer_resident
from partinf.planner.search import search
from partinf.plans import Plan
from partinf.simulation.arrivals import Arrival
from partinf.simulation.step_price import StepPrice
from partinf.workload import DType, Workload

_JUDGED = 24  # candidates of the planner that are judged again


@dataclass(frozen=True)
class Traffic:
    """Mean lengths of the requests, and how many are decoded together."""

    max_batch_size: int
    input_len: int
    output_len: int

    @classmethod
    def of(cls, arrivals: Sequence[Arrival], max_batch_size: int) -> Traffic:
        inputs, outputs = sum(a.input_len for a in arrivals), sum(a.output_len for a in arrivals)
        return cls(max_batch_size, max(1, inputs // len(arrivals)), max(1, outputs // len(arrivals)))


def serving_plan(
    model: ModelConfig,
    slice_: Slice,
    traffic: Traffic,
    weights: DType = DType.BF16,
    kv: DType = DType.BF16,
    calibration: str = "fitted",
    num_stages: int | None = None,
) -> Plan:
    """The layout with the shortest mean iteration in the steady state: one decode step, and the prefills of those who replace the ended.

    Args:
        num_stages: pipeline stages that it must have; None leaves that to the search.

    Raises:
        InvalidInput: nothing fits.
    """
    workload = Workload(traffic.max_batch_size, traffic.input_len, traffic.output_len, weights=weights, kv=kv)
    alone = replace(workload, prefill_batch=1)  # where pages are preempted, prompts come one by one too
    for asked in (workload, *with_fewer_resident(alone)):
        found = search(model, slice_, asked, calibration=calibration)
        if num_stages is not None:
            staged = tuple(c for c in found.candidates if ways(c.layout.storage_axes(Role.STAGE), slice_.axis_sizes) == num_stages)
            if not staged:
                raise InvalidInput(
                    f"slice {slice_.name} ({slice_.mesh}): no axes that make {num_stages} stages of {model.num_layers} layers"
                )
            found = replace(found, candidates=staged)
        fitting = [c for c in found.candidates if c.fits and not c.padded_heads][:_JUDGED]
        if fitting:
            break
    pricing = Pricing(slice_, found.calibration, found.bandwidth_model, found.program)
    plans = [_gathering_where_it_pays(replace(plan, predicted=()), pricing) for c in fitting for plan in _undealt(plan_of(found, c))]
    if not plans:
        raise InvalidInput(misfit(found))
    return min(plans, key=lambda plan: iteration_seconds(plan, pricing, traffic))


def iteration_seconds(plan: Plan, pricing: Pricing, traffic: Traffic) -> float:
    """Mean iteration of a full batch, dealt over the pipeline stages, whose ended requests are replaced at once: prompts in the step of
    every stage lengthen a tick no more than one does."""
    price, stages = StepPrice(plan, pricing), plan.num_stages
    decode = stages * price.decode_seconds(ceil_div(traffic.max_batch_size, stages), traffic.input_len + traffic.output_len // 2)
    return decode + traffic.max_batch_size / traffic.output_len * price.prefill_seconds(traffic.input_len)


def _gathering_where_it_pays(plan: Plan, pricing: Pricing) -> Plan:
    """The plan without prefill's FFN roles where they lose once attention is counted in: the planner compares linear layers alone, and
    tokens that are split for them have to be exchanged when attention splits heads."""
    never = replace(plan, prefill_from_tokens=NEVER)
    if plan.prefill_from_tokens >= NEVER:
        return never
    length = 2 * plan.prefill_from_tokens
    seconds = [StepPrice(each, pricing).prefill_seconds(length) for each in (plan, never)]
    return plan if seconds[0] < seconds[1] else never


def _undealt(plan: Plan) -> Iterator[Plan]:
    """The plan with prompts that are not dealt over axes: by heads over those axes, or by nothing where heads do not divide."""
    layout = plan.layout
    dealt = layout.prefill.attention_axes(AttentionRole.BATCH)
    for role in (AttentionRole.HEADS, AttentionRole.NONE) if plan.ways(dealt) > 1 else (AttentionRole.BATCH,):
        attention = tuple((axis, role if axis in dealt else has) for axis, has in layout.prefill.attention)
        try:
            yield replace(plan, layout=Layout(layout.storage, replace(layout.prefill, attention=attention), layout.decode))
        except InvalidInput:
            continue
