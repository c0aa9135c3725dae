"""`plan --prove`: the planner's top candidates go to the real compiler, and its answer orders them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from partinf.cost.movement import ways
from partinf.layout import Layout, Role

if TYPE_CHECKING:
    from partinf.planner.report import Candidate, PlanReport
    from partinf.proof import Proof

Proofs = dict[tuple[Layout, int], "Proof"]
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
    from partinf.buckets import serving_steps
    from partinf.planner.choose import plan_of
    from partinf.proof import Limits, prove

    proofs: Proofs = {}
    for candidate in report.candidates:
        plan = plan_of(report, candidate)
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


def show(before: PlanReport, after: PlanReport, proofs: Proofs) -> None:
    """Print what was proven beside what was predicted."""
    from rich.table import Table

    from partinf.planner.show.table import stored, wide_console

    table = Table(box=None, pad_edge=False, header_style="bold", title="Proven by the compiler, its order", title_justify="left")
    for title in ("", "planned", "weights", "phases"):
        table.add_column(title)
    for title in ("predicted ms", "proven ms", "GiB needed", ""):
        table.add_column(title, justify="right")
    places = {key(candidate): index for index, candidate in enumerate(before.candidates, start=1)}
    proven = [candidate for candidate in after.candidates if key(candidate) in proofs]
    for index, candidate in enumerate(proven, start=1):
        proof = proofs[key(candidate)]
        phases = "; ".join(f"{result.name}: {result.ffn}, {result.attention}" for result in candidate.phases)
        needed = max(step.memory.needed for step in proof.steps) / (1 << 30)
        time = f"{1e3 * proven_seconds(after, candidate, proof):.4g}" if proof.fits else ""
        cells = (f"{1e3 * candidate.score:.4g}", time, f"{needed:.2f}", "" if proof.fits else "does not fit")
        table.add_row(str(index), f"#{places[key(candidate)]}", stored(candidate), phases, *cells)
    console = wide_console()
    console.print(table)
    console.print()
