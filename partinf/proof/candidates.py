"""The planner's candidates, proven: its first ones go to the real compiler, and what that says orders them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from partinf.buckets import serving_steps
from partinf.cost.movement import ways
from partinf.layout import Layout, Role
from partinf.planner.report import PlanReport
from partinf.planner.results import Candidate
from partinf.proof import Limits, Proof, prove

Proofs = dict[tuple[Layout, int], Proof]
"""Proofs by layout and padded heads, which tell candidates apart."""


def key(candidate: Candidate) -> tuple[Layout, int]:
    return candidate.layout, candidate.padded_heads


def prove_candidates(report: PlanReport, count: int, seconds: float, advance: Callable[[int], None]) -> tuple[PlanReport, Proofs]:
    """Prove the first `count` candidates that can run, and put them in the order of what the compiler says.

    Args:
        seconds: bound on one compilation. advance: called with 1 after each candidate.

    Returns:
        The report with the proven candidates that fit first, by their proven time; then what was not proven, in the planner's order; then
        what the compiler refuses. And the proofs.
    """
    proofs: Proofs = {}
    for candidate in report.candidates:
        plan = report.plan_of(candidate)
        if len(proofs) == count or not candidate.fits:
            break
        if plan.runnable is None:
            proofs[key(candidate)] = prove(*serving_steps(plan, report.workload), Limits(seconds=seconds))
            advance(1)
    return replace(report, candidates=reordered(report, proofs)), proofs


def reordered(report: PlanReport, proofs: Proofs) -> tuple[Candidate, ...]:
    """The candidates in the order that the proofs give them."""

    def place(candidate: Candidate) -> tuple[int, float]:
        proof = proofs.get(key(candidate))
        if proof is None:
            return 1, 0.0
        return (0, proven_seconds(report, candidate, proof)) if proof.fits else (2, candidate.score)

    return tuple(sorted(report.candidates, key=place))


def proven_seconds(report: PlanReport, candidate: Candidate, proof: Proof) -> float:
    """The candidate's score with the compiler's estimate in the place of each predicted step."""
    ticks = ways(candidate.layout.storage_axes(Role.STAGE), report.slice.axis_sizes)  # the compiler sees one
    seconds = [ticks * step.estimate.seconds if step.estimate else 0.0 for step in proof.steps]
    if report.workload.phase is not None:
        return seconds[0]
    decode, prefill = seconds
    return report.workload.counted_prefills * prefill + report.workload.output_len * decode
