"""The planner's choice against every other candidate that fits and runs, under the counted program; `compiled.py` has the compiled one.

python -m experiments.planner_regret.measure                       writes results.json; compiles two programs where the count disagrees
python -m experiments.planner_regret.measure --only v4:2x2x4       judges some cases anew and replaces their rows
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from experiments.planner_regret.cases import SEED, Case, cases
from experiments.planner_regret.judge import Judged, judged, program_of
from experiments.results import read, write
from partinf.cost.program import PLAIN, TILED, program_for
from partinf.hardware.slices import parse_slice
from partinf.layout import Role
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.report import PlanReport
from partinf.planner.results import Candidate
from partinf.proof.process import Limits, compile_bucket
from partinf.proof.proving import schedule_of

CASES = 30
DISAGREES = 0.15  # a regret from which the compiler decides between the choice and what the count puts first


def able(report: PlanReport) -> list[Candidate]:
    """Candidates that fit and that the library runs, in the planner's order."""
    return [c for c in report.candidates if c.fits and program_of(report, c)[0].runnable is None]


def rivals(found: list[Candidate], most: int | None, draw: random.Random) -> list[Candidate]:
    """Of more than `most`, as many: the first half of them, and a seeded sample of the rest; None for all."""
    return found if most is None or len(found) <= most else found[: most // 2] + draw.sample(found[most // 2 :], most - most // 2)


def judge(case: Case, most: int | None, draw: random.Random) -> dict[str, Any] | None:
    """One row of the table; None when nothing fits."""
    question = load_model_config(case.model), parse_slice(case.slice), case.workload
    tiled = replace(TILED, either_residual=False, either_layers=False)  # roles are judged here, in one program for all of them
    priced = tiled if program_for(question[1].chip) is TILED else program_for(question[1].chip)
    plain, default = search(*question, calibration="none", program=PLAIN), search(*question, program=priced)
    found = able(plain)
    if not found:
        return None
    half = most // 2 if most else None
    first = {"default": able(default)[:half], "tiled": able(search(*question, program=tiled))[:half]}
    rival = {_key(candidate): candidate for candidate in (*rivals(found, most, draw), *first["default"], *first["tiled"])}
    times = {key: judged(plain, candidate) for key, candidate in rival.items()}
    chosen, usual, tiled = found[0], first["default"][0], first["tiled"][0]
    mine, usual_times, runs = (times[_key(candidate)] for candidate in (chosen, usual, tiled))
    best = min(times, key=lambda key: times[key].fitted)

    def regret(one: Judged, of: Callable[[Judged], float]) -> float:
        return of(one) / min(map(of, times.values())) - 1

    return {
        "case": str(case),
        "candidates": len(found),
        "judged": len(times),
        "chosen": _line(usual, usual_times),
        "chosen_for_tiled": _line(tiled, runs),
        "chosen_for_plain": _line(chosen, mine),
        "best": _line(rival[best], times[best]),
        "regret": regret(usual_times, lambda j: j.fitted),
        "regret_at_stated_rates": regret(usual_times, lambda j: j.stated),
        "regret_for_tiled": regret(runs, lambda j: j.fitted),
        "regret_for_plain": regret(mine, lambda j: j.stated),
        "regret_for_plain_unfused": regret(mine, lambda j: j.unfused),
        "median_candidate": sorted(j.fitted for j in times.values())[len(times) // 2] / times[best].fitted - 1,
        "judged_with_stages": sum(bool(c.layout.storage_axes(Role.STAGE)) for c in rival.values()),
        "judged_with_sequence": sum("sequence" in _attention(c).values() for c in rival.values()),
    }


def _key(candidate: Candidate) -> tuple[object, ...]:
    """What tells two steps apart, whichever search found them."""
    return candidate.layout.storage, candidate.main.phase, candidate.padded_heads


def _attention(candidate: Candidate) -> dict[str, str]:
    return {axis: role.value for axis, role in candidate.main.phase.attention}


def _line(candidate: Candidate, found: Judged) -> dict[str, Any]:
    step = candidate.main
    return {
        "layout": candidate.name.rsplit(", ", 2)[0] + f", {step.ffn}",
        "gather": "".join(step.phase.gather),
        "attention": _attention(candidate),
        "planner_ms": 1e3 * step.step_seconds,
        "judged_ms": 1e3 * found.fitted,
        "stated_ms": 1e3 * found.stated,
    }


def compiled_ms(case: Case, row: dict[str, Any]) -> dict[str, float]:
    """What the choice for the tiled program and the best by the count take by the compiler, in the program in which both were counted."""
    question = load_model_config(case.model), parse_slice(case.slice), case.workload
    report, found = search(*question, calibration="none", program=PLAIN), dict[str, float]()
    for which in ("chosen_for_tiled", "best"):
        wanted = {key: row[which][key] for key in ("layout", "gather", "attention")}
        candidate = next(one for one in able(report) if wanted.items() <= _line(one, Judged(0.0, 0.0, 0.0)).items())
        plan, bucket = program_of(report, candidate)
        found[which] = 1e3 * schedule_of(plan, bucket, compile_bucket(plan, bucket, Limits()).program).seconds
    return found


def counted_rows(most: int | None, only: str, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each of the first cases in which something fits."""
    rows: list[dict[str, Any]] = []
    for case in cases(2 * CASES):
        if len(rows) == CASES:
            break
        if only not in str(case):
            row = next((row for row in kept if row["case"] == str(case)), None)
        else:
            row = judge(case, most, random.Random(f"{SEED} {case}"))
            if row is not None:
                counts = f"{row['judged']:3} of {row['candidates']:4}"
                kinds = ("regret", "regret_for_tiled", "regret_at_stated_rates", "regret_for_plain", "regret_for_plain_unfused")
                print(f"{row['case']:60} {counts} {' '.join(f'{row[kind]:8.2%}' for kind in kinds)}", flush=True)
        if row is not None:
            if row["regret_for_tiled"] > DISAGREES and "compiled_ms" not in row:
                row["compiled_ms"] = compiled_ms(case, row)
                print(f"{row['case']:60} by the compiler: {row['compiled_ms']}", flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, help="candidates counted per case (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this text")
    args = parser.parse_args()
    kept = read(__file__, missing={"rows": []})
    write(__file__, kept | {"seed": SEED, "most_judged": args.most, "rows": counted_rows(args.most, args.only, kept["rows"])})


if __name__ == "__main__":
    main()
