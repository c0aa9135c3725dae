"""A search's report as plain data for `--format json`. The field names are an interface that other programs rely on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from partinf.cost.ledger import Collective, Entry, Ledger
from partinf.cost.program import Residual
from partinf.foundation.limits import NEVER
from partinf.planner.report import PlanReport
from partinf.planner.results import Candidate, PhaseResult
from partinf.planner.show.commands import served_memory
from partinf.planner.trials import Trial, price_per_million_tokens

# Figures of an entry that are left out where they are zero or empty; a report holds tens of thousands of entries.
_OPTIONAL = (
    "flops",
    "padding_flops",
    "weight_bytes",
    "kv_bytes",
    "activation_bytes",
    "bytes",
    "padding_bytes",
    "dtype",
    "overlapped",
)


class Ledgers(Protocol):
    """What a candidate's ledger becomes: one value for its entries, and one for its collectives, summed."""

    def entries(self, ledger: Ledger) -> Any: ...

    def collectives(self, ledger: Ledger) -> Any: ...


def report_json(report: PlanReport, proofs: Mapping[int, dict[str, Any]] | None = None, ledgers: Ledgers | None = None) -> dict[str, Any]:
    """`{"model", "slice", "workload", "best", "candidates", …}`, candidates best first and those that do not fit last.

    Args:
        proofs: what the compiler says, by the place of the candidate; becomes its "proof". ledgers: lists of data unless given.
    """
    workload = report.workload
    ledgers = ledgers or _Data()
    candidates = [candidate_json(candidate, ledgers) for candidate in report.candidates]
    for place, proof in (proofs or {}).items():
        candidates[place]["proof"] = proof
    return {
        "model": report.model.name,
        "slice": report.slice.name,
        "mesh": report.slice.mesh,
        "workload": {
            "phase": workload.phase,
            "batch": workload.batch,
            "prefill_batch": workload.prompts_per_step,
            "input": workload.input_len,
            "output": workload.output_len,
            "context": workload.decode_context,
            "weights": workload.weights.value,
            "kv": workload.kv.value,
            "objective": workload.objective.value,
            "max_latency_ms": None if workload.max_latency is None else workload.max_latency * 1e3,
        },
        "bandwidth_model": report.bandwidth_model.value,
        "program": report.program.name,
        "routing_skew": report.question.skew,
        "layers": report.layers,
        "calibration": {
            "name": report.calibration.name,
            "measured": report.calibration.measured,
            "error": report.calibration.error,
            "source": report.calibration.source,
            "left_out": report.calibration.left_out,
            "intervals": dict(report.calibration.intervals),
        },
        "best": candidates[0],
        "first_token_seconds": report.first_token_seconds(report.best),
        "served": None if (memory := served_memory(report, report.best)) is None else memory.as_json(),
        "batch_advice": _batch_advice(report),
        "ffn_by_tokens": _ffn_by_tokens(report),
        "candidates": candidates,
        "refused": [{"reason": refused.reason, "count": refused.count} for refused in report.refused],
    }


def _batch_advice(report: PlanReport) -> dict[str, Any] | None:
    advice = report.batch_advice
    if advice is None:
        return None
    return {
        "batch": advice.batch,
        "limit": advice.limit,
        "critical": advice.critical,
        "by_memory": advice.by_memory,
        "by_latency": advice.by_latency,
        "by_arrivals": advice.by_arrivals,
        "most_requests_per_second": advice.most_requests,
        "lanes": advice.lanes,
        "multiple": advice.multiple,
        "experts": None if advice.experts is None else asdict(advice.experts),
    }


def _ffn_by_tokens(report: PlanReport) -> list[dict[str, Any]]:
    """Which FFN roles of the best candidate a step runs, by its number of tokens; empty for a single phase."""
    best = report.best
    results = {result.name: result for result in best.phases}
    if len(results) < 2:
        return []
    switch = report.plan.prefill_from_tokens
    found = [{"from_tokens": 1, "phase": "decode", "ffn": results["decode"].ffn}]
    if switch < NEVER:
        found.append({"from_tokens": switch, "phase": "prefill", "ffn": results["prefill"].ffn})
    return found


def trials_json(trials: Sequence[Trial], per_chip_hour: float | None) -> dict[str, Any]:
    """`{"slices": [...]}`, the cheapest first, where several were tried; with a price, what a million tokens cost on the chosen one."""
    found: dict[str, Any] = {}
    if len(trials) > 1:
        found["slices"] = [
            {"slice": t.report.slice.name, "mesh": t.report.slice.mesh, "chips": t.report.slice.num_chips, "seconds": t.seconds}
            | {"meets_bound": t.accepted, "chip_seconds": t.chip_seconds}
            for t in trials
        ]
    if per_chip_hour is not None:
        found["price_per_million_tokens"] = price_per_million_tokens(trials[0], per_chip_hour)
    return found


def candidate_json(candidate: Candidate, ledgers: Ledgers) -> dict[str, Any]:
    """One candidate; top-level times are those of its main phase."""
    memory, main = candidate.memory, candidate.main
    return {
        "layout": candidate.name,
        "roles": {axis: role.value for axis, role in candidate.layout.storage},
        **({"experts": {axis: role.value for axis, role in candidate.layout.experts}} if candidate.layout.experts else {}),
        "fits": candidate.fits,
        "tie_with_best": candidate.tie_with_best,
        "meets_bound": candidate.meets_bound,
        "padded_heads": candidate.padded_heads,
        "hbm_bytes_per_device": {
            "weights": memory.weights,
            "kv": memory.kv,
            "activations": memory.activations,
            "total": memory.total,
            "usable": memory.usable,
        },
        "step_seconds": main.step_seconds,
        "total_seconds": candidate.score,
        "seconds_per_token": candidate.seconds_per_token,
        "tokens_per_second": candidate.tokens_per_second,
        "mfu": main.mfu,
        "chip_ms_per_token": candidate.chip_ms_per_token,
        "ffn": main.ffn,
        "attention": main.attention,
        "phases": {result.name: _phase_json(result, ledgers) for result in candidate.phases},
    }


def _phase_json(result: PhaseResult, ledgers: Ledgers) -> dict[str, Any]:
    return {
        "gather": list(result.phase.gather),
        **_of_experts(result),
        "residual": (Residual.WHOLE if result.phase.whole else Residual.SPLIT).value,
        "attention_roles": {axis: role.value for axis, role in result.phase.attention},
        "ffn": result.ffn,
        "attention": result.attention,
        "step_seconds": result.step_seconds,
        "mfu": result.mfu,
        "collectives": ledgers.collectives(result.ledger),
        "ledger": ledgers.entries(result.ledger),
    }


def _of_experts(result: PhaseResult) -> dict[str, Any]:
    """What a phase does about experts; nothing where the layout has no roles for them."""
    phase = result.phase
    return {"gather_experts": list(phase.gather_experts), "dispatch": phase.dispatch.value} if result.layout.experts else {}


class _Data:
    """Ledgers as lists."""

    def entries(self, ledger: Ledger) -> list[dict[str, Any]]:
        return [entry_json(entry) for entry in ledger.entries]

    def collectives(self, ledger: Ledger) -> list[dict[str, Any]]:
        """Summed over the step by op, axes and dtype; bytes per device and step."""
        return [collective_json(one) for one in ledger.collectives]


def collective_json(one: Collective) -> dict[str, Any]:
    """One line of a ledger's collectives."""
    return {"op": one.op.value, "axes": list(one.axes), "bytes": one.bytes, "count": one.count, "seconds": one.seconds, "dtype": one.dtype}


def entry_json(entry: Entry) -> dict[str, Any]:
    """One entry of a ledger."""
    line: dict[str, Any] = {"name": entry.name, "part": entry.part.value, "kind": entry.kind.value}
    line |= {"count": entry.count, "seconds": entry.seconds}
    if entry.op is not None:
        line["op"], line["axes"] = entry.op.value, list(entry.axes)
    for key in _OPTIONAL:
        value = getattr(entry, key)
        if value:
            line[key] = value
    if entry.routed is not None:
        line["routed"] = entry.routed._asdict()
    return line
