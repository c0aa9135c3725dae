"""Plans chosen for a load and bounds on its requests: of one slice the layout, of a kind of chip the cheapest slice.

What a load needs of chips is given by its rate, so that the cheapest slice is the smallest that serves it in time: slices that can be
rented are tried from the smallest up to the first that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from partinf.buckets import capacity_for
from partinf.engine.policies.registry import PolicyOptions
from partinf.foundation.errors import InvalidInput
from partinf.hardware.chips import Chip
from partinf.model.weights import num_params
from partinf.planner.question import Question
from partinf.planner.report import PlanReport, answer
from partinf.planner.results import Candidate
from partinf.planner.slices import MOST_CHIPS, slices_of
from partinf.simulation.arrivals import Arrival
from partinf.simulation.choice import IN_TIME, MOST_LAYOUTS, Choice, Service, choose
from partinf.simulation.report import LatencyBounds
from partinf.simulation.serving_plan import in_turn
from partinf.simulation.sizing import Sizing

_LAYOUTS_OF_MANY = 4  # that are compared on each of several slices
_SCHEDULER = "fcfs-chunked"


@dataclass(frozen=True)
class Load:
    """Requests as they arrive, and what each must meet."""

    arrivals: Sequence[Arrival]
    bounds: LatencyBounds


@dataclass(frozen=True)
class Planned:
    """A report whose best candidate is the one that served the load best, and what it was compared with; None where no candidate was
    worth a simulation, since not even a prompt that comes alone is in time."""

    report: PlanReport
    choice: Choice | None

    @property
    def in_time(self) -> float:
        """Share of the requests in time."""
        return 0.0 if self.choice is None else self.choice.best.in_time

    @property
    def accepted(self) -> bool:
        """The load is served in time, and a latency bound of the workload holds."""
        return self.in_time >= IN_TIME and self.report.best.meets_bound


def planned(report: PlanReport, load: Load, most: int = MOST_LAYOUTS) -> Planned:
    """The report with the candidate in front that serves the load best: of at most so many that fit, those best in turn by the workload, by
    prefill and by decode.

    Raises:
        InvalidInput: nothing fits, or nothing that does holds a request.
    """
    fitting = [candidate for candidate in report.candidates if candidate.fits and report.plan_of(candidate).runnable is None]
    if not fitting:
        raise InvalidInput(report.misfit)
    first = min(fitting, key=lambda candidate: _seconds(candidate, "prefill"))
    bound = load.bounds.ttft
    if bound is not None and _seconds(first, "prefill") > bound:
        return Planned(report, None)
    rankings = [fitting, *(sorted(fitting, key=lambda c, label=label: _seconds(c, label)) for label in ("prefill", "decode"))]  # type: ignore[misc]
    contenders = in_turn(rankings, most)
    plans = [replace(report.plan_of(candidate), predicted=()) for candidate in contenders]
    choice = choose(_service(report, load), plans, load.arrivals)
    best = contenders[next(index for index, plan in enumerate(plans) if plan is choice.best.plan)]
    return Planned(replace(report, candidates=(best, *(c for c in report.candidates if c is not best))), choice)


def smallest_in_time(question: Question, chip: Chip, load: Load) -> list[Planned]:
    """Slices of a chip from the smallest that holds the model up to the first that serves the load in time, that one foremost.

    Raises:
        InvalidInput: none does; which came nearest.
    """
    tried: list[Planned] = []
    least = num_params(question.model) * question.workload.weights.num_bytes
    for slice_ in slices_of(chip):
        if slice_.num_devices * chip.usable_hbm_per_device() < least:
            continue
        try:
            tried.append(planned(answer(question, slice_), load, _LAYOUTS_OF_MANY))
        except InvalidInput:  # its axes do not divide the model, or it is too small
            continue
        if tried[-1].accepted:
            return [tried[-1], *tried[:-1]]
    if not tried:
        raise InvalidInput(f"model {question.model.name} fits no slice of {chip.name} of up to {MOST_CHIPS} chips")
    near = max(tried, key=lambda one: one.in_time)
    raise InvalidInput(
        f"no slice of {chip.name} of up to {MOST_CHIPS} chips serves {IN_TIME:.0%} of the requests in time; {near.report.slice.name} comes "
        f"nearest with {near.in_time:.0%}"
    )


def _seconds(candidate: Candidate, label: str) -> float:
    result = candidate.phase(label)
    return float("inf") if result is None else result.step_seconds


def _service(report: PlanReport, load: Load) -> Service:
    """An engine of the workload's batch and lengths, with the share of prompts in a step that plans have by default."""
    workload = report.workload
    capacity = capacity_for(report.plan, workload)
    sizing = Sizing(
        max_rows=workload.batch,
        max_residents=workload.batch,
        max_len=workload.input_len + workload.output_len,
        prefill_tokens=capacity.prefill_tokens,
    )
    return Service(report.pricing, sizing, _SCHEDULER, PolicyOptions(workload.batch), load.bounds)
