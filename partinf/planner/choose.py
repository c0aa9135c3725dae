"""From a report to the `Plan` that everything else takes: the best candidate and why it won."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from partinf.cost.collectives import BandwidthModel
from partinf.cost.ledger import EntryKind, Ledger
from partinf.cost.movement import ways
from partinf.cost.program import Program
from partinf.foundation.errors import DoesNotFit
from partinf.foundation.rounding import ceil_div
from partinf.hardware.slices import Link, Slice
from partinf.layout import PHASES, AttentionRole, Layout, Role
from partinf.model.config import ModelConfig
from partinf.planner.meshes import fastest
from partinf.planner.question import Question
from partinf.planner.report import Candidate, PlanReport
from partinf.planner.search import answer
from partinf.planner.switch import prefill_from
from partinf.plans import CacheConfig, Plan
from partinf.workload import Workload

_SIZED = 24  # candidates whose cache is worked out, of those that hold the weights


def plan(
    model: ModelConfig,
    slice_: Slice,
    workload: Workload,
    *,
    calibration: str = "fitted",
    bandwidth_model: BandwidthModel = BandwidthModel.AXIS,
    program: Program | None = None,
    only_runnable: bool = True,
    sized: Callable[[Plan], Plan] | None = None,
    finer: bool = False,
) -> Plan:
    """The best layout for a workload, as a plan.

    Args:
        finer: take a finer mesh where it is faster (`partinf.planner.meshes.fastest`).
        only_runnable: leave out layouts that can be planned but not run yet: those that pad heads in groups.
        sized: gives a plan its cache and its steps. Where it finds no room under any layout, or no layout holds the whole batch at full
            length, layouts are looked for whose cache holds half of it, then a quarter, and so on: the others wait, or are preempted.

    Raises:
        InvalidInput: nothing fits; by how much, and what would help.
    """
    refusal: DoesNotFit | None = None
    for asked in [workload] if sized is None else [workload, *with_fewer_resident(workload)]:
        question = Question(model, asked, calibration, bandwidth_model, program)
        reports = _reports(question, slice_, finer)
        plans = (plan_of(report, candidate) for report in reports for candidate in report.candidates if candidate.fits)
        able = (found for found in plans if not (only_runnable and found.runnable))
        for found in itertools.islice(able, None if sized is None else _SIZED):
            try:
                return found if sized is None else sized(found)
            except DoesNotFit as error:
                refusal = refusal or error
    raise refusal or DoesNotFit(misfit(answer(question, slice_)))


def _reports(question: Question, slice_: Slice, finer: bool) -> Iterator[PlanReport]:
    """What is chosen from: a finer mesh first, if it is faster and was asked for."""
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


def misfit(report: PlanReport) -> str:
    """Why nothing fits: the smallest budget that was found, against what a device has."""
    least = min(report.candidates, key=lambda candidate: candidate.memory.total).memory
    held = f"weights {least.weights / 1e9:.1f} + KV {least.kv / 1e9:.1f} + activations {least.activations / 1e9:.1f} GB"
    return (
        f"model {report.model.name} does not fit {report.slice.name}: {held} = {least.total / 1e9:.1f} GB per device under the smallest "
        f"layout, usable {least.usable / 1e9:.1f} GB; a larger slice, a smaller batch or context, or int8 would help"
    )


def plan_of(report: PlanReport, candidate: Candidate) -> Plan:
    """One candidate of a report as a plan, sized for the report's workload."""
    workload = report.workload
    context = max(workload.max_context, 1)
    page = CacheConfig().page_size
    roles = (AttentionRole.BATCH, AttentionRole.SEQUENCE)
    shards, parts = (ways(candidate.layout.decode.attention_axes(role), report.slice.axis_sizes) for role in roles)
    lanes = ceil_div(workload.batch, shards)
    cache = CacheConfig(page, lanes * parts * ceil_div(context, page * parts), lanes * shards)
    predicted = tuple((result.name, result.ledger) for result in candidate.phases)
    layout = running_layout(report, candidate)
    return Plan(
        report.model,
        report.slice,
        layout,
        workload.weights,
        workload.kv,
        context,
        cache,
        prefill_from(report, layout, candidate.padded_heads),
        predicted,
        why(report, candidate),
        candidate.padded_heads,
    )


def running_layout(report: PlanReport, candidate: Candidate) -> Layout:
    """The candidate's layout as an engine runs it: with weights gathered ahead in the phases that gather any, where gathers can run beside
    products and the memory that it takes is there.

    A parallel block has no use for it: all its products wait for the same activations, and a TPU's compiler runs the gathers of those that
    come later beside those that come first.
    """
    layout, held = candidate.layout, candidate.memory
    if not report.slice.chip.platform.gathers_beside_products or report.model.block.parallel:
        return layout
    for label in PHASES:
        phase = layout.phase(label)
        changed: dict[str, Any] = {label: replace(phase, ahead=bool(phase.gather))}
        ahead = replace(layout, **changed)
        activations = report.evaluator.activations(report.evaluator.split(ahead, label, candidate.padded_heads))
        if held.weights + held.kv + activations <= held.usable:
            layout = ahead
    return layout


def why(report: PlanReport, candidate: Candidate) -> str:
    """One or two sentences: what the step spends its time on, and what the nearest other kinds of layout would cost."""
    asked = candidate.asked
    parts = _shares(asked.ledger)
    spent = ", ".join(f"{name} {share:.0%}" for name, share in parts[:3])
    text = f"A {asked.name} step of {asked.step_seconds * 1e3:.4g} ms goes to {spent}."
    others = []
    for label, kind in (("FFN", "ffn"), ("attention over", "attention")):
        mine = getattr(asked, kind)
        rival = next((c for c in report.candidates if getattr(c.asked, kind) != mine), None)
        if rival is None:
            continue
        other = getattr(rival.asked, kind)
        if not rival.fits:
            others.append(f"{label} {other} does not fit ({rival.memory.total / 1e9:.1f} GB per device)")
        else:
            tie = "a tie; " if rival.tie_with_best and candidate.tie_with_best else ""
            reason = _difference(asked.ledger, rival.asked.ledger)
            others.append(f"{label} {other} would cost {rival.score / candidate.score - 1:+.1%} ({tie}{reason})")
    text += f" Against {asked.ffn} with attention over {asked.attention}, {' and '.join(others)}." if others else ""
    return text + _between_stages(report, candidate)


def _between_stages(report: PlanReport, candidate: Candidate) -> str:
    """What other roles of the network between slices, or of the axes of pipeline stages, would cost."""
    roles = dict(candidate.layout.storage)
    axes = [axis.name for axis in report.slice.axes if axis.size > 1 and (axis.link is Link.DCN or roles[axis.name] is Role.STAGE)]
    text = ""
    for axis in axes:
        others = []
        for role in Role:
            same = (c for c in report.candidates if dict(c.layout.storage)[axis] is role)
            rival = None if role is roles[axis] else next(same, None)
            if rival is None:
                continue
            if not rival.fits:
                others.append(f"{_AS[role]} do not fit ({rival.memory.total / 1e9:.1f} GB per device)")
            else:
                change = _difference(candidate.asked.ledger, rival.asked.ledger)
                others.append(f"{_AS[role]} would cost {rival.score / candidate.score - 1:+.1%} ({change})")
        if others:
            text += f" Axis {axis} splits {_SPLITS[roles[axis]]}: {', '.join(others)}."
    return text


_SPLITS = {Role.EMBED: "d_model", Role.FFN: "d_ff and heads", Role.REPLICA: "the batch", Role.STAGE: "the layers into stages"}
_AS = {
    Role.EMBED: "shards of d_model there",
    Role.FFN: "tensors there",
    Role.REPLICA: "copies of the weights there",
    Role.STAGE: "stages there",
}


def _difference(mine: Ledger, other: Ledger) -> str:
    """Where another step spends more time and where less, in milliseconds."""
    mine_by, other_by = _by_kind(mine), _by_kind(other)
    changes = sorted(((other_by[name] - mine_by[name], name) for name in mine_by), key=lambda pair: -abs(pair[0]))
    return ", ".join(f"{name} {seconds * 1e3:+.3g} ms" for seconds, name in changes[:2])


def _shares(ledger: Ledger) -> list[tuple[str, float]]:
    """Shares of the step's time by what it is spent on, largest first."""
    total = ledger.seconds or 1.0
    return sorted(((name, value / total) for name, value in _by_kind(ledger).items()), key=lambda pair: -pair[1])


def _by_kind(ledger: Ledger) -> dict[str, float]:
    """Exposed seconds by what they are spent on."""
    names = {
        EntryKind.MATMUL: "matmuls",
        EntryKind.ATTENTION: "attention",
        EntryKind.COLLECTIVE: "collectives",
        EntryKind.MEMORY: "other memory traffic",
    }
    sums = dict.fromkeys(names.values(), 0.0)
    for entry in ledger.entries:
        sums[names[entry.kind]] += entry.exposed_seconds
    return sums
