"""Two questions after a search: what would make it fit, and how large a batch is worth having.

Both vary one thing at a time around a report's best (or smallest) candidate and price it anew; the roles stay as they are, so an answer
costs a millisecond and a new search may only do better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from partinf.cost.memory import MemoryBudget
from partinf.cost.pricing import Pricing
from partinf.cost.roofline import critical_batch, shapes
from partinf.hardware import make_slice
from partinf.planner.evaluate import Evaluator
from partinf.planner.report import Candidate, PlanReport
from partinf.planner.search import search
from partinf.workload import DType, Workload

_MOST_BATCH = 1 << 14
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
    pricing = Pricing(report.slice, report.calibration, report.bandwidth_model, report.program)
    evaluator = Evaluator(report.model, pricing, workload)
    priced = [evaluator.price(candidate.layout, result.name, candidate.padded_heads) for result in candidate.phases]
    return evaluator.memory(candidate.layout, priced, candidate.padded_heads)


def _smallest_that_fits(report: PlanReport) -> PlanReport | None:
    """The report for the smallest slice of the same chip that holds the workload; sizes whose HBM cannot are passed over."""
    chip = report.slice.chip
    least = min(candidate.memory.total for candidate in report.candidates)
    for shape in shapes(chip, _MOST_TIMES_LARGER * report.slice.num_chips):
        larger = make_slice(chip, shape)
        if larger.num_chips <= report.slice.num_chips or larger.num_devices * larger.chip.usable_hbm_per_device() < least:
            continue
        found = search(
            report.model, larger, report.workload, calibration=_mode(report), bandwidth_model=report.bandwidth_model, program=report.program
        )
        if found.best.fits:
            return found
    return None


def _mode(report: PlanReport) -> str:
    return "none" if report.calibration.name == "none" else "fitted"


@dataclass(frozen=True)
class BatchAdvice:
    """How large a decode batch is worth having, and what limits it.

    Attributes:
        critical: tokens per step at which reading the weights is hidden behind their products.
        by_memory: largest batch whose weights, cache and activations fit.
        by_latency: largest batch whose step keeps the latency bound; None without a bound.
        limit: `memory`, `latency` or `compute`: what stops the batch from growing (with profit) beyond `batch`.
    """

    critical: float
    by_memory: int
    by_latency: int | None
    batch: int
    limit: str

    def __str__(self) -> str:
        reasons = {
            "memory": f"a larger one does not fit beside the weights (critical batch {self.critical:.0f})",
            "latency": f"a larger one misses the latency bound (memory would hold {self.by_memory})",
            "compute": f"from there on reading the weights is hidden behind their products (memory would hold {self.by_memory})",
        }
        return f"batch {self.batch}: {reasons[self.limit]}"


def batch_advice(report: PlanReport) -> BatchAdvice:
    """The largest batch worth decoding together under the best candidate's roles.

    The critical batch is that of the chip; the latency bound is that of a decode step when one phase was asked for.
    """
    workload, best = report.workload, report.best
    critical = critical_batch(report.slice.chip, workload.weights)
    by_memory = _largest(lambda batch: _memory(report, best, replace(workload, batch=batch)).fits)
    bound = workload.max_latency if workload.phase == "decode" else None
    by_latency = None if bound is None else _largest(lambda batch: _step_seconds(report, best, batch) <= bound)
    limits = {"memory": by_memory, "compute": int(critical)}
    if by_latency is not None:
        limits["latency"] = by_latency
    limit = min(limits, key=lambda name: limits[name])
    return BatchAdvice(critical, by_memory, by_latency, limits[limit], limit)


def _step_seconds(report: PlanReport, candidate: Candidate, batch: int) -> float:
    pricing = Pricing(report.slice, report.calibration, report.bandwidth_model, report.program)
    evaluator = Evaluator(report.model, pricing, replace(report.workload, batch=batch))
    return evaluator.price(candidate.layout, "decode", candidate.padded_heads).seconds


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest batch for which a property holds that larger ones lose; 0 if none has it."""
    low, high = 0, 1
    while high <= _MOST_BATCH and holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
