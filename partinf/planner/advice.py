"""The pre-flight: does it fit, and what would make it fit.

One thing at a time is varied around a report's smallest candidate; the roles stay as they are, so an answer costs a millisecond and a new
search may only do better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from partinf.cost.memory import MemoryBudget
from partinf.model.weights import num_params
from partinf.planner.evaluate import padded_heads
from partinf.planner.report import Candidate, PlanReport
from partinf.planner.search import answer
from partinf.planner.slices import slices_of
from partinf.workload import DType, Workload

_MOST_TIMES_LARGER = 16


@dataclass(frozen=True)
class Change:
    """One thing changed and the memory after it, per device."""

    what: str
    memory: MemoryBudget

    def __str__(self) -> str:
        verdict = "fits" if self.memory.fits else f"{(self.memory.total - self.memory.usable) / 1e9:.1f} GB too much"
        return f"{self.what}: {self.memory.total / 1e9:.1f} GB per device, {verdict}"


def preflight(report: PlanReport) -> list[Change]:
    """What to change so that it fits, each change alone, with the memory after it; empty when it fits already."""
    if report.best.fits:
        return []
    least = min(report.candidates, key=lambda candidate: candidate.memory.total)
    found = [Change(what, _memory(report, least, workload)) for what, workload in _changed(report.workload)]
    unpadded = [candidate for candidate in report.candidates if not candidate.padded_heads]
    if least.padded_heads and unpadded:
        smallest = min(unpadded, key=lambda candidate: candidate.memory.total)
        found.append(Change(f"heads not padded to {least.padded_heads}", smallest.memory))
    larger = _smallest_that_fits(report)
    if larger is not None:
        found.append(Change(f"slice {larger.slice.name}", larger.best.memory))
    return found


def _changed(workload: Workload) -> Iterator[tuple[str, Workload]]:
    if workload.weights is not DType.INT8:
        yield "weights in int8", replace(workload, weights=DType.INT8)
    if workload.kv is not DType.INT8:
        yield "KV in int8", replace(workload, kv=DType.INT8)
    if workload.weights is not DType.INT8 and workload.kv is not DType.INT8:
        yield "weights and KV in int8", replace(workload, weights=DType.INT8, kv=DType.INT8)
    if workload.batch > 1:
        yield f"batch {workload.batch // 2}", replace(workload, batch=workload.batch // 2)
    if workload.context_len and workload.context_len > 1:
        yield f"context {workload.context_len // 2}", replace(workload, context_len=workload.context_len // 2)
    elif workload.input_len > 1:
        yield f"input {workload.input_len // 2}", replace(workload, input_len=workload.input_len // 2)


def _memory(report: PlanReport, candidate: Candidate, workload: Workload) -> MemoryBudget:
    evaluator = report.evaluator.under(workload)
    priced = [evaluator.price(candidate.layout, result.name, candidate.padded_heads) for result in candidate.phases]
    return evaluator.memory(candidate.layout, priced, candidate.padded_heads)


def _smallest_that_fits(report: PlanReport) -> PlanReport | None:
    """The report for the smallest slice of the same chip that holds the workload; sizes whose HBM cannot are passed over."""
    chip = report.slice.chip
    least = min(candidate.memory.total for candidate in report.candidates)
    for larger in slices_of(chip, _MOST_TIMES_LARGER * report.slice.num_chips):
        if larger.num_chips <= report.slice.num_chips or larger.num_devices * larger.chip.usable_hbm_per_device() < least:
            continue
        found = answer(report.question, larger)
        if found.best.fits:
            return found
    return None


def head_splits(report: PlanReport) -> str:
    """How query heads split over the slice's devices, and what padding them would cost; empty where they split over all of them."""
    model, devices = report.model, report.slice.num_devices
    heads = model.num_heads
    if heads % devices == 0:
        return ""
    splits = ", ".join(str(parts) for parts in range(1, heads + 1) if heads % parts == 0)
    text = f"{heads} query heads split evenly into {splits} parts"
    padded = padded_heads(model, devices)
    if padded is None:
        return f"{text}; over {devices} devices they would have to be padded more than twofold"
    wider = model.with_padded_heads(padded)
    added = num_params(wider) - num_params(model)
    each = added * report.workload.weights.num_bytes / devices
    cost = f"{added / 1e9:.3g} B parameters more, {each / 1e9:.2g} GB per device"
    return f"{text}; over {devices} devices they are padded to {padded}: {cost}"
