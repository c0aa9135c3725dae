"""A third opinion, where it is cheap: the program of a candidate, compiled for its TPU slice by the real compiler and read.

The step that an engine would run is compiled whole and its schedule priced (`partinf.proof`): a walk over the compiler's cycles, the
transfers beside them and every collective of the compiled text. Nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from experiments.planner_regret.cases import Case
from experiments.planner_regret.judge import judged, program_of
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.report import PlanReport
from partinf.planner.results import Candidate
from partinf.planner.show.work import roles_of
from partinf.proof import Limits, prove

CASES, KINDS = 6, 4
_COUNTED = 40  # of the planner's first candidates, the one that the counted program puts first is compiled too


def compiled_rows(drawn: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """A row for each of the first TPU cases, one per pair of chip and phase."""
    seen: set[object] = set()
    for case in drawn:
        kind = case.slice.partition(":")[0], case.workload.phase
        report = search(load_model_config(case.model), parse_slice(case.slice), case.workload)
        if kind in seen or not report.slice.chip.platform.described or not report.best.fits:
            continue
        seen.add(kind)
        yield _row(case, report)
        if len(seen) == CASES:
            break


def _row(case: Case, report: PlanReport) -> dict[str, Any]:
    found = []
    for candidate in _worth_compiling(report):
        plan, bucket = program_of(report, candidate)
        step = prove(plan, [bucket], Limits(seconds=300)).steps[0]
        seconds = plan.num_stages * step.estimate.seconds if step.estimate else None
        found.append(
            {
                "layout": f"{candidate.name.rsplit(', ', 2)[0]}, {roles_of(candidate.asked)}",
                "planner_ms": 1e3 * candidate.asked.step_seconds,
                "compiled_ms": None if seconds is None else 1e3 * seconds,
                "compile_seconds": step.compile_seconds,
            }
        )
        print(f"{case!s:60} {found[-1]['layout']:50} {found[-1]['planner_ms']:9.4g} {found[-1]['compiled_ms'] or 0:9.4g}", flush=True)
    best = min(line["compiled_ms"] for line in found if line["compiled_ms"] is not None)
    mine = found[0]["compiled_ms"]
    return {"case": str(case), "candidates": found, "regret": None if mine is None else mine / best - 1}


def _worth_compiling(report: PlanReport) -> list[Candidate]:
    """The choice, the first candidate of each other kind, and the one that the counted program puts first."""
    able = [c for c in report.candidates if c.fits and program_of(report, c)[0].runnable is None]
    kinds: dict[object, Candidate] = {}
    for candidate in able:
        kinds.setdefault((candidate.layout.storage, candidate.asked.ffn, candidate.asked.attention), candidate)
    chosen = list(kinds.values())[:KINDS]
    counted = min(able[:_COUNTED], key=lambda c: judged(report, c).fitted)
    return chosen if counted in chosen else [*chosen, counted]
