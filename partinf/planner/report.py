"""The answer of one slice: its candidates in order, and all figures and sentences about them. A candidate's plan and why it won, and
advice: what would make it fit, how its heads split, how large a batch is worth having.

A report prices everything on the question's own terms, so that all of its figures are comparable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from partinf.cost.calibration import Calibration
from partinf.cost.collectives import BandwidthModel
from partinf.cost.movement import ways
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED, Program
from partinf.foundation.errors import InvalidInput
from partinf.foundation.rounding import ceil_div
from partinf.hardware.slices import Slice
from partinf.layout import PHASES, AttentionRole, Dispatch, ExpertRole, Layout
from partinf.model.config import ModelConfig
from partinf.planner.advice import Change, changes, head_splits
from partinf.planner.batch import BatchAdvice, batch_advice
from partinf.planner.candidates import SPLITTING
from partinf.planner.evaluate import Evaluator
from partinf.planner.expert_storage import expert_offence
from partinf.planner.question import Question
from partinf.planner.reasons import why, why_experts
from partinf.planner.results import Candidate, Refused
from partinf.planner.search import Search, given, order
from partinf.planner.slices import slices_of
from partinf.planner.switch import SwitchRow, prefill_from, switch_table
from partinf.plans import CacheConfig, Plan, layout_offences
from partinf.workload import Workload

_MOST_TIMES_LARGER = 16


@dataclass(frozen=True)
class PlanReport:
    """The answer of one slice: all candidates, the best first and those that do not fit last."""

    question: Question
    slice: Slice
    candidates: tuple[Candidate, ...]
    refused: tuple[Refused, ...] = ()

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def smallest(self) -> Candidate:
        """The one that needs the least memory."""
        return min(self.candidates, key=lambda candidate: candidate.memory.total)

    @property
    def model(self) -> ModelConfig:
        return self.question.model

    @property
    def workload(self) -> Workload:
        return self.question.workload

    @property
    def bandwidth_model(self) -> BandwidthModel:
        return self.question.bandwidth_model

    @property
    def program(self) -> Program:
        return self.pricing.program

    @property
    def layers(self) -> str:
        """How the priced program of the best layout has the layers of each stage: `one by one` or `in a loop`."""
        alone = self.evaluator.unrolled and self.evaluator.stages(self.best.layout) == 1
        return "one by one" if (alone if self.program.either_layers else self.program.unrolled) else "in a loop"

    @property
    def routing(self) -> str:
        """How routers were taken to choose among experts, where it was not uniformly: what follows a list of terms."""
        return f", routers skewed by {self.question.skew:g}" if self.question.skew else ""

    @property
    def pricing(self) -> Pricing:
        """What its steps were priced with."""
        return self.evaluator.pricing

    @property
    def calibration(self) -> Calibration:
        return self.pricing.calibration

    @cached_property
    def evaluator(self) -> Evaluator:
        """What prices further steps as those of the report were."""
        return self.question.evaluator(self.slice)

    @cached_property
    def engine_evaluator(self) -> Evaluator:
        """The same for steps as an engine runs them, whatever program the layouts were chosen for."""
        return replace(self.question, program=TILED).evaluator(self.slice)

    @cached_property
    def plan(self) -> Plan:
        """The best candidate as a plan."""
        return self.plan_of(self.best)

    def plan_of(self, candidate: Candidate) -> Plan:
        """One candidate as a plan, sized for the workload."""
        workload = self.workload
        context = max(workload.max_context, 1)
        page = CacheConfig().page_size
        roles = (AttentionRole.BATCH, AttentionRole.SEQUENCE)
        shards, sequence_shards = (ways(candidate.layout.decode.attention_axes(role), self.slice.axis_sizes) for role in roles)
        lanes = ceil_div(workload.batch, shards)
        cache = CacheConfig(page, lanes * sequence_shards * ceil_div(context, page * sequence_shards), lanes * shards)
        predicted = tuple((result.name, result.ledger) for result in candidate.phases)
        layout = self.engine_layout(candidate)
        return Plan(
            self.model,
            self.slice,
            layout,
            workload.weights,
            workload.kv,
            context,
            cache,
            prefill_from(self.engine_evaluator, layout, candidate.padded_heads),
            predicted,
            why(self.slice, self.candidates, candidate) + why_experts(candidate, self._other_experts(candidate)),
            candidate.padded_heads,
        )

    def _other_experts(self, candidate: Candidate) -> dict[str, Candidate | str]:
        """The candidate with every axis that splits experts' matrices splitting the experts, and with every such axis splitting their d_ff,
        where that is another layout, or why the model cannot have it; nothing is gathered or exchanged in these."""
        layout, found = candidate.layout, dict[str, Candidate | str]()
        for name, role in (
            ("splitting the experts over all their axes", ExpertRole.EXPERT),
            ("splitting d_ff over all their axes", ExpertRole.FFN),
        ):
            roles = tuple((axis, role if has in SPLITTING else has) for axis, has in layout.experts)
            phases: dict[str, Any] = {label: replace(layout.phase(label), gather_experts=(), dispatch=Dispatch.GATHER) for label in PHASES}
            other = replace(layout, **phases, experts=roles, check=False)
            if roles == layout.experts:
                continue
            if reason := expert_offence(self.model, tuple(role for _, role in roles), tuple(self.slice.axis_sizes.values())):
                found[name] = reason
            elif not layout_offences(self.model, self.slice, other, candidate.padded_heads):
                (found[name],) = given(self.question, self.slice, [(other, candidate.padded_heads)])
        return found

    def engine_layout(self, candidate: Candidate) -> Layout:
        """The candidate's layout as an engine runs it: with weights gathered ahead in the phases that gather any, where gathers can run
        during products and the memory that it takes is there.

        A parallel block has no use for it: all its products wait for the same activations, and a TPU's compiler runs the gathers of those
        that come later during those that come first.
        """
        layout, held = candidate.layout, candidate.memory
        if not self.slice.chip.platform.gathers_overlap_products or self.model.block.parallel:
            return layout
        for label in PHASES:
            phase = layout.phase(label)
            changed: dict[str, Any] = {label: replace(phase, ahead=bool(phase.gather))}
            ahead = replace(layout, **changed)
            activations = self.evaluator.activations(self.evaluator.split(ahead, label, candidate.padded_heads))
            if held.weights + held.kv + activations <= held.usable:
                layout = ahead
        return layout

    @property
    def switch_table(self) -> list[SwitchRow]:
        """Steps of prompts below, at and above the number of tokens from which the plan runs prefill's FFN roles; empty for never."""
        plan = self.plan
        return switch_table(self.engine_evaluator, plan.layout, plan.padded_heads, plan.prefill_from_tokens)

    def first_token_seconds(self, candidate: Candidate) -> float | None:
        """Prefill of one prompt that comes alone: its time to first token where nothing waits. None where nothing is prefilled."""
        if candidate.phase("prefill") is None:
            return None
        alone = self.evaluator.under(replace(self.workload, prefill_batch=1))
        coupling = alone.coupling(candidate.layout, candidate.padded_heads)
        return alone.price(candidate.layout, "prefill", candidate.padded_heads).seconds + coupling.seconds

    @property
    def misfit(self) -> str:
        """Why nothing fits: the smallest budget that was found, against what a device has."""
        least = self.smallest.memory
        held = f"weights {least.weights / 1e9:.1f} + KV {least.kv / 1e9:.1f} + activations {least.activations / 1e9:.1f} GB"
        return (
            f"model {self.model.name} does not fit {self.slice.name}: {held} = {least.total / 1e9:.1f} GB per device under the smallest "
            f"layout, usable {least.usable / 1e9:.1f} GB; a larger slice, a smaller batch or context, or int8 would help"
        )

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """What to change so that it fits, each change alone, with the memory after it; empty when it fits already."""
        if self.best.fits:
            return ()
        larger = self._smallest_that_fits()
        grown = (Change(f"slice {larger.slice.name}", larger.best.memory),) if larger is not None else ()
        return (*changes(self.evaluator, self.candidates), *grown)

    def _smallest_that_fits(self) -> PlanReport | None:
        """The report for the smallest slice of the same chip that holds the workload; sizes whose HBM cannot are passed over."""
        chip = self.slice.chip
        for larger in slices_of(chip, _MOST_TIMES_LARGER * self.slice.num_chips):
            hbm = larger.num_devices * larger.chip.usable_hbm_per_device()
            if larger.num_chips <= self.slice.num_chips or hbm < self.smallest.memory.total:
                continue
            found = answer(self.question, larger)
            if found.best.fits:
                return found
        return None

    @property
    def head_splits(self) -> str:
        """How query heads split over the devices, and what padding them would cost; empty where they split over all of them."""
        return head_splits(self.evaluator)

    @cached_property
    def batch_advice(self) -> BatchAdvice | None:
        """The largest batch worth decoding together under the best candidate's roles; None where nothing decodes or nothing fits."""
        return batch_advice(self.evaluator, self.best)


def search(
    model: ModelConfig,
    slice_: Slice,
    workload: Workload,
    *,
    calibration: str = "fitted",
    bandwidth_model: BandwidthModel = BandwidthModel.AXIS,
    program: Program | None = None,
    skew: float = 0.0,
) -> PlanReport:
    """Price every role assignment of `slice_` for this workload.

    Args:
        calibration: `fitted` or `none` (the pure roofline).
        program: what is credited, see `partinf.cost.program`; that of the chip if not given.
        skew: of routers of experts, see `partinf.cost.routing`; 0 for uniform routing.

    Raises:
        InvalidInput: when no assignment can hold the model at all, with the reasons, or when the mesh has too many axes to try all.
    """
    return answer(Question(model, workload, calibration, bandwidth_model, program, skew), slice_)


def answer(question: Question, slice_: Slice, known: float = math.inf) -> PlanReport:
    """The same for one question and several slices or meshes.

    Args:
        known: a score that some candidate is known to have, so that what is much slower is passed over from the start.
    """
    search_ = Search(question, slice_, known=known)
    return report_of(search_, search_.candidates())


def report_of(search_: Search, found: Iterable[Candidate]) -> PlanReport:
    """The answer, from all that a search found.

    Raises:
        InvalidInput: it found nothing, and why.
    """
    found, refused = tuple(found), search_.reasons()
    if not found:
        raise InvalidInput([f"model {search_.model.name} on {search_.slice.name}: {one.reason}" for one in refused])
    return PlanReport(search_.question, search_.slice, order(found), refused)
