"""The planner's choice against every other candidate that fits and runs, under an account that is not its own.

python -m experiments.planner_regret.measure [--most N]             writes results.json beside this file
python -m experiments.planner_regret.measure --only v4:2x2x4       judges some cases anew and replaces their rows
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from experiments.planner_regret.cases import SEED, Case, cases
from experiments.planner_regret.judge import judged_seconds, program_of
from partinf.cost.pricing import PLAIN
from partinf.hardware import parse_slice
from partinf.model_config import load_model_config
from partinf.planner import search
from partinf.planner.report import Candidate, PlanReport

CASES = 30


@dataclass(frozen=True)
class Judged:
    """A candidate and its time under the second account, with int8 weights read as such and as they are multiplied."""

    candidate: Candidate
    seconds: float
    unfused: float


def rivals(report: PlanReport, most: int, draw: random.Random) -> list[Candidate]:
    """Candidates that fit and that the library runs, the planner's order; beyond `most` the first half and a seeded sample of the rest."""
    able = [c for c in report.candidates if c.fits and not program_of(report, c)[0].runnable]
    if len(able) <= most:
        return able
    return able[: most // 2] + draw.sample(able[most // 2 :], most - most // 2)


def judge(case: Case, most: int, draw: random.Random) -> dict[str, object] | None:
    """One row of the table; None when nothing fits."""
    report = search(load_model_config(case.model), parse_slice(case.slice), case.workload, calibration="none", program=PLAIN)
    chosen = rivals(report, most, draw)
    if not chosen:
        return None
    judged = [Judged(candidate, *judged_seconds(report, candidate)) for candidate in chosen]
    first, best = judged[0], min(judged, key=lambda j: j.seconds)
    return {
        "case": str(case),
        "candidates": sum(c.fits for c in report.candidates),
        "judged": len(judged),
        "chosen": _line(first),
        "best": _line(best),
        "regret": first.seconds / best.seconds - 1,
        "regret_unfused": first.unfused / min(j.unfused for j in judged) - 1,
        "median_candidate": sorted(j.seconds for j in judged)[len(judged) // 2] / best.seconds - 1,
    }


def _line(judged: Judged) -> dict[str, object]:
    phase = judged.candidate.asked.phase
    return {
        "layout": judged.candidate.name.split(", ")[0] + f", {judged.candidate.asked.ffn}",
        "gather": "".join(phase.gather),
        "attention": {axis: role.value for axis, role in phase.attention},
        "planner_ms": 1e3 * judged.candidate.asked.step_seconds,
        "judged_ms": 1e3 * judged.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=250, help="candidates judged per case (default: 250)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this text")
    args = parser.parse_args()
    results_file = Path(__file__).with_name("results.json")
    kept = json.loads(results_file.read_text())["rows"] if args.only else []
    rows: list[dict[str, object]] = []
    for case in cases(2 * CASES):
        if len(rows) == CASES:
            break
        if args.only not in str(case):
            row = next((row for row in kept if row["case"] == str(case)), None)
        else:
            row = judge(case, args.most, random.Random(f"{SEED} {case}"))
            if row is not None:
                print(
                    f"{row['case']:60} {row['judged']:3} of {row['candidates']:4} {row['regret']:7.2%} {row['regret_unfused']:7.2%}",
                    flush=True,
                )
        if row is not None:
            rows.append(row)
    results_file.write_text(json.dumps({"seed": SEED, "most_judged": args.most, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
