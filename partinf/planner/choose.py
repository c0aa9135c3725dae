"""The best plan for a workload: of the layouts that run, the first that holds its cache and its steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from partinf.foundation.errors import DoesNotFit
from partinf.hardware.slices import Slice
from partinf.model.config import ModelConfig
from partinf.planner.meshes import fastest
from partinf.planner.question import Question
from partinf.planner.report import PlanReport, answer
from partinf.plans import Plan
from partinf.workload import Workload

_SIZED = 24  # candidates whose cache is worked out, of those that hold the weights


def plan(
    model: ModelConfig,
    slice_: Slice,
    workload: Workload,
    *,
    sized: Callable[[Plan], Plan] | None = None,
    finer: bool = False,
) -> Plan:
    """The best layout for a workload that can be run, as a plan.

    Args:
        finer: take a finer mesh where it is faster (`partinf.planner.meshes.fastest`).
        sized: gives a plan its cache and its steps. Where it finds no room under any layout, or no layout holds the whole batch at full
            length, layouts are looked for whose cache holds half of it, then a quarter, and so on: the others wait, or are preempted.

    Raises:
        InvalidInput: nothing fits; by how much, and what would help.
    """
    refusal: DoesNotFit | None = None
    for load in [workload] if sized is None else [workload, *with_fewer_resident(workload)]:
        question = Question(model, load)
        reports = _reports(question, slice_, finer)
        plans = (report.plan_of(candidate) for report in reports for candidate in report.candidates if candidate.fits)
        able = (found for found in plans if found.runnable is None)
        for found in itertools.islice(able, None if sized is None else _SIZED):
            try:
                return found if sized is None else sized(found)
            except DoesNotFit as error:
                refusal = refusal or error
    raise refusal or DoesNotFit(answer(question, slice_).misfit)


def _reports(question: Question, slice_: Slice, finer: bool) -> Iterator[PlanReport]:
    """What is chosen from: a finer mesh first, if it is faster and allowed."""
    chosen = fastest(question, slice_) if finer else answer(question, slice_)
    yield chosen
    if chosen.slice != slice_:
        yield answer(question, slice_)


def with_fewer_resident(workload: Workload) -> Iterator[Workload]:
    """The workload with half of its sequences in the cache at full length, a quarter, and so on down to one."""
    resident = (workload.resident or workload.batch) // 2
    while resident:
        yield replace(workload, resident=resident)
        resident //= 2
