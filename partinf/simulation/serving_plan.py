"""A layout for serving: chosen for the iterations that requests make of themselves, a full batch that decodes and now and then a prompt.

The planner judges the prefill of a whole batch of prompts, which it may split over the axes. Requests come one by one, and a single prompt
would be padded to every shard that prompts are split over. So the planner's best are judged again, with prompts that are split by heads.

`serving_plan` takes the best for a batch that is always full. At a known rate fewer may be in flight, and bounds on single requests ask for
other things than the mean iteration does: `contenders` are the few that are best in one way or another, for a simulation to choose among
(`partinf.simulation.choice`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from partinf.buckets import num_programs
from partinf.cost.movement import ways
from partinf.cost.pricing import Pricing
from partinf.foundation.errors import InvalidInput
from partinf.foundation.limits import NEVER
from partinf.foundation.rounding import ceil_div
from partinf.hardware.slices import Slice
from partinf.layout import AttentionRole, Role
from partinf.model.config import ModelConfig
from partinf.planner.choose import with_fewer_resident
from partinf.planner.report import search
from partinf.plans import Plan
from partinf.simulation.arrivals import Arrival
from partinf.simulation.step_price import StepPrice
from partinf.workload import DType, Workload

T = TypeVar("T")
_JUDGED = 24  # candidates of the planner that are judged again


@dataclass(frozen=True)
class Traffic:
    """Mean lengths of the requests, how many are decoded together at most, and how many come per second.

    Attributes:
        rate: infinite where all are there at once, or where that is not known.
    """

    max_batch_size: int
    input_len: int
    output_len: int
    rate: float = math.inf

    @classmethod
    def of(cls, arrivals: Sequence[Arrival], max_batch_size: int) -> Traffic:
        inputs, outputs = sum(a.input_len for a in arrivals), sum(a.output_len for a in arrivals)
        seconds = arrivals[-1].time - arrivals[0].time
        rate = (len(arrivals) - 1) / seconds if seconds > 0 else math.inf
        return cls(max_batch_size, max(1, inputs // len(arrivals)), max(1, outputs // len(arrivals)), rate)

    @property
    def context(self) -> int:
        """Of a request in the middle of its answer."""
        return self.input_len + self.output_len // 2

    def in_flight(self, step_seconds: float) -> int:
        """Requests that decode at a time when a step takes so long, by Little's law; at most a full batch."""
        return max(1, min(self.max_batch_size, math.ceil(min(self.rate * self.output_len * step_seconds, self.max_batch_size))))


@dataclass(frozen=True)
class Terms:
    """How models are stored and priced, and how many pipeline stages a layout must have; None leaves those to the search.

    Attributes:
        skew: of routers of experts, see `partinf.cost.routing`; 0 for uniform routing.
    """

    weights: DType = DType.BF16
    kv: DType = DType.BF16
    calibration: str = "fitted"
    num_stages: int | None = None
    skew: float = 0.0


def serving_plan(model: ModelConfig, slice_: Slice, traffic: Traffic, terms: Terms | None = None) -> Plan:
    """The layout with the shortest mean iteration in steady state: one decode step, and the prefills of requests that replace ended ones.

    Raises:
        InvalidInput: nothing fits.
    """
    plans, pricing = _plans(model, slice_, traffic, traffic.max_batch_size, terms or Terms())
    return min(plans, key=lambda plan: iteration_seconds(plan, pricing, traffic))


def contenders(model: ModelConfig, slice_: Slice, traffic: Traffic, terms: Terms, most: int) -> list[Plan]:
    """At most so many layouts, the best in turn by four prices: a mean iteration of the full batch and of as many as are in flight at the
    rate, the prefill of a prompt, and a decode step of those in flight.

    Raises:
        InvalidInput: nothing fits.
    """
    full, pricing = _plans(model, slice_, traffic, traffic.max_batch_size, terms)
    first = min(full, key=lambda plan: iteration_seconds(plan, pricing, traffic))
    rows = ceil_div(traffic.max_batch_size, first.num_stages)
    few = traffic.in_flight(_price(first, pricing, traffic).decode_seconds(rows, traffic.context))
    plans = full if few == traffic.max_batch_size else full + _plans(model, slice_, traffic, few, terms)[0]
    distinct = list({(plan.layout, plan.prefill_from_tokens): plan for plan in plans}.values())
    prices: list[Callable[[Plan], float]] = [
        lambda plan: iteration_seconds(plan, pricing, traffic),
        lambda plan: iteration_seconds(plan, pricing, replace(traffic, max_batch_size=few)),
        lambda plan: _price(plan, pricing, traffic).prefill_seconds(traffic.input_len),
        lambda plan: _price(plan, pricing, traffic).decode_seconds(ceil_div(few, plan.num_stages), traffic.context),
    ]
    return in_turn([sorted(distinct, key=price) for price in prices], most)


def in_turn(rankings: Sequence[Sequence[T]], most: int) -> list[T]:
    """The first of every ranking, then the second of each, and so on: so many, none twice."""
    found: list[T] = []
    for rank in itertools.chain.from_iterable(itertools.zip_longest(*rankings)):
        if rank is not None and not any(rank is other for other in found):
            found.append(rank)
        if len(found) == most:
            break
    return found


def _plans(model: ModelConfig, slice_: Slice, traffic: Traffic, batch: int, terms: Terms) -> tuple[list[Plan], Pricing]:
    """The planner's best for a batch of this size, prompts not split over axes, and how they are priced."""
    workload = Workload(batch, traffic.input_len, traffic.output_len, weights=terms.weights, kv=terms.kv)
    alone = replace(workload, prefill_batch=1)  # where pages are preempted, prompts come one by one too
    for load in (workload, *with_fewer_resident(alone)):
        found = search(model, slice_, load, calibration=terms.calibration, skew=terms.skew)
        if terms.num_stages is not None:
            staged = tuple(c for c in found.candidates if ways(c.layout.storage_axes(Role.STAGE), slice_.axis_sizes) == terms.num_stages)
            if not staged:
                axes = f"slice {slice_.name} ({slice_.mesh})"
                raise InvalidInput(f"{axes}: no axes that make {terms.num_stages} stages of {model.num_layers} layers")
            found = replace(found, candidates=staged)
        fitting = [c for c in found.candidates if c.fits and not c.padded_heads][:_JUDGED]
        if fitting:
            break
    pricing = found.question.pricing(slice_)
    bound = (replace(plan, predicted=()) for c in fitting for plan in _without_batch_split(found.plan_of(c)))
    plans = [_gathering_where_it_pays(plan, pricing, traffic) for plan in bound]
    if not plans:
        raise InvalidInput(found.misfit)
    return plans, pricing


def iteration_seconds(plan: Plan, pricing: Pricing, traffic: Traffic) -> float:
    """Mean iteration of a full batch, spread over the pipeline stages, whose ended requests are replaced at once. A tick is as long as the
    step of the stage with the most prompts, and a prompt is on every stage in turn."""
    price, stages = _price(plan, pricing, traffic), plan.num_stages
    decode = price.decode_seconds(ceil_div(traffic.max_batch_size, stages), traffic.input_len + traffic.output_len // 2)
    prompts = most_prompts(traffic.max_batch_size / stages / traffic.output_len, stages)
    return stages * (decode + prompts * price.prefill_seconds(traffic.input_len))


def most_prompts(mean: float, stages: int) -> float:
    """Prompts on the stage that has the most of them, on average over ticks, where `mean` of them begin in a tick, at random: the sum over
    k of the chance that some stage has more than k."""
    spread = 10 * math.sqrt(mean) + 20  # beyond which chances are negligible
    first = max(0, math.floor(mean - spread))
    below, found = 0.0, float(first)
    for count in range(first, math.ceil(mean + spread)) if mean else ():
        below += math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
        found += 1 - min(below, 1.0) ** stages
    return found


def _price(plan: Plan, pricing: Pricing, traffic: Traffic) -> StepPrice:
    """Of steps of the engine that serves this traffic: the plan has no buckets yet, by which it decides how layers are compiled."""
    programs = num_programs(Workload(traffic.max_batch_size, traffic.input_len, traffic.output_len))
    unrolled = plan.slice.chip.platform.unrolls(plan.model.num_layers * programs, plan.num_stages)
    return StepPrice(plan, pricing.compiled(unrolled))


def _gathering_where_it_pays(plan: Plan, pricing: Pricing, traffic: Traffic) -> Plan:
    """The plan without prefill's FFN roles where they lose once attention is counted in: the planner compares linear layers alone, and
    tokens that are split for them have to be exchanged when attention splits heads."""
    never = replace(plan, prefill_from_tokens=NEVER)
    if plan.prefill_from_tokens >= NEVER:
        return never
    length = 2 * plan.prefill_from_tokens
    seconds = [_price(each, pricing, traffic).prefill_seconds(length) for each in (plan, never)]
    return plan if seconds[0] < seconds[1] else never


def _without_batch_split(plan: Plan) -> Iterator[Plan]:
    """The plan with prompts that no axis splits by request: by heads over those axes, or by nothing where heads do not divide."""
    layout = plan.layout
    batch = layout.prefill.attention_axes(AttentionRole.BATCH)
    for role in (AttentionRole.HEADS, AttentionRole.NONE) if plan.ways(batch) > 1 else (AttentionRole.BATCH,):
        attention = tuple((axis, role if axis in batch else has) for axis, has in layout.prefill.attention)
        try:
            yield replace(plan, layout=replace(layout, prefill=replace(layout.prefill, attention=attention)))
        except InvalidInput:
            continue
