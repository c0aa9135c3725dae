"""The pre-flight: does it fit, and what would make it fit.

One thing at a time is varied around a report's smallest candidate; the roles stay as they are, so an answer costs a millisecond and a new
search may only do better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from partinf.cost.memory import MemoryBudget
from partinf.model.weights import num_params
from partinf.planner.evaluate import Evaluator, padded_heads
from partinf.planner.results import Candidate
from partinf.workload import DType, Workload


@dataclass(frozen=True)
class Change:
    """One thing changed and the memory after it, per device."""

    what: str
    memory: MemoryBudget

    def __str__(self) -> str:
        verdict = "fits" if self.memory.fits else f"{(self.memory.total - self.memory.usable) / 1e9:.1f} GB too much"
        return f"{self.what}: {self.memory.total / 1e9:.1f} GB per device, {verdict}"


def changes(evaluator: Evaluator, candidates: Sequence[Candidate]) -> list[Change]:
    """What to change on the same slice, each change alone, with the memory after it."""
    least = min(candidates, key=lambda candidate: candidate.memory.total)
    found = [Change(what, _memory(evaluator.under(workload), least)) for what, workload in _changed(evaluator.workload)]
    unpadded = [candidate for candidate in candidates if not candidate.padded_heads]
    if least.padded_heads and unpadded:
        smallest = min(unpadded, key=lambda candidate: candidate.memory.total)
        found.append(Change(f"heads not padded to {least.padded_heads}", smallest.memory))
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


def _memory(evaluator: Evaluator, candidate: Candidate) -> MemoryBudget:
    priced = [evaluator.price(candidate.layout, result.name, candidate.padded_heads) for result in candidate.phases]
    return evaluator.memory(candidate.layout, priced, candidate.padded_heads)


def head_splits(evaluator: Evaluator) -> str:
    """How query heads split over the slice's devices, and what padding them would cost; empty where they split over all of them."""
    model, devices = evaluator.model, evaluator.pricing.slice.num_devices
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
    each = added * evaluator.workload.weights.num_bytes / devices
    cost = f"{added / 1e9:.3g} B parameters more, {each / 1e9:.2g} GB per device"
    return f"{text}; over {devices} devices they are padded to {padded}: {cost}"
