"""A third opinion: the planner's choice and its rivals, compiled for their TPU slice and read as `partinf prove` reads a plan.

    python -m experiments.planner_regret.compiled TEXTS             # hours of one core, no TPU; writes compiled.json, prints the table
    python -m experiments.planner_regret.compiled TEXTS --most 6    # of each case so many programs, the choice and its nearest first
    python -m experiments.planner_regret.compiled TEXTS --compiled  # only of programs that are compiled already

TEXTS: a folder that keeps what the compiler printed for each program, so that a run can be resumed; it belongs to one state of the library.
Every candidate is judged as the engine would run it: its roles, the residual that the planner chose with them, layers one by one or in a
loop as its plan has them. What costs most to compile is left small: of layers that are compiled one by one there are three and five, and
what the two add stands for each other one; the vocabulary has 2048 tokens, and what more of them takes is the planner's own account.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.planner_regret.cases import SEED, Case, compiled_cases
from experiments.results import write
from partinf.buckets import serving_steps
from partinf.hardware.slices import parse_slice
from partinf.layout import AttentionRole, Role
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.report import PlanReport
from partinf.planner.results import Candidate
from partinf.planner.show.work import roles_of
from partinf.plans import Bucket, Plan
from partinf.proof.process import Compiled, Limits, compile_bucket
from partinf.proof.proving import planned_ledger, schedule_of

DEPTHS, VOCABULARY = (3, 5), 2048  # the first layers read ahead otherwise than those between: with one and three, 8 % off
NEAREST, RANDOM = 4, 4


def classes(candidate: Candidate) -> set[str]:
    """The named classes that a candidate belongs to."""
    main, copies = candidate.main, candidate.layout.storage_axes(Role.REPLICA)
    sizes = main.sizes
    copied = any(sizes[axis] > 1 for axis in copies)
    found = {"sequence"} if any(sizes[axis] > 1 for axis in main.phase.attention_axes(AttentionRole.SEQUENCE)) else set()
    if main.ffn.startswith("wg"):
        return found | {"weight-gathered"}
    if copied:
        return found | {"copies"}
    return found | {{"ws-1d": "1D", "ws-2d": "2D"}.get(main.ffn, "other")}


def rivals(able: Sequence[Candidate], draw: random.Random) -> list[tuple[Candidate, str]]:
    """The choice, its nearest rivals, the best of every named class, and some of the rest, in the order in which they are judged."""
    found = [(able[0], "choice"), *((one, "near") for one in able[1:2])]
    for name in ("1D", "2D", "copies", "sequence", "weight-gathered"):
        first = next((one for one in able if name in classes(one)), None)
        if first is not None and all(first is not one for one, _ in found):
            found.append((first, f"best {name}"))
    known = {id(one) for one, _ in found}
    found += [(one, "near") for one in able[2 : 1 + NEAREST] if id(one) not in known]
    known = {id(one) for one, _ in found}
    rest = [one for one in able if id(one) not in known]
    return [*found, *((one, "random") for one in draw.sample(rest, min(RANDOM, len(rest))))]


@dataclass(frozen=True)
class Texts:
    """What the compiler printed for programs. `compiling`: those that are missing are compiled."""

    folder: Path
    compiling: bool = True

    def compiled(self, plan: Plan, bucket: Bucket) -> Compiled | None:
        """Of one program; None where it is missing and stays so."""
        path = self.folder / f"{_key(plan, bucket)}.json.gz"
        if not path.is_file():
            if not self.compiling:
                return None
            compiled = compile_bucket(plan, bucket, Limits(seconds=1200))
            path.write_bytes(gzip.compress(json.dumps(asdict(compiled)).encode()))
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))


def seconds(plan: Plan, bucket: Bucket, texts: Texts) -> float | None:
    """A step of a plan by its compiled program; None where the compiler refuses it, or it is not compiled. Of pipeline stages, all the
    ticks of one batch."""
    small = replace(plan, model=replace(plan.model, vocab_size=VOCABULARY))
    ends = planned_ledger(plan, bucket).seconds - planned_ledger(small, bucket).seconds
    layers = plan.model.num_layers
    depths = DEPTHS if plan.unrolled else (layers,)
    found = [walked(replace(small, model=replace(small.model, num_layers=depth)), bucket, texts) for depth in depths]
    times = [one for one in found if one is not None]
    if len(times) < len(depths):
        return None
    each = (times[-1] - times[0]) / (DEPTHS[1] - DEPTHS[0]) if plan.unrolled else 0.0
    return plan.num_stages * (times[-1] + (layers - depths[-1]) * each + ends)


def walked(plan: Plan, bucket: Bucket, texts: Texts) -> float | None:
    """Seconds of one compiled program."""
    compiled = texts.compiled(plan, bucket)
    return None if compiled is None or compiled.refusal else schedule_of(plan, bucket, compiled.program).seconds


def _key(plan: Plan, bucket: Bucket) -> str:
    """Of a program: all that it is compiled from but the library."""
    versions = [metadata.version(name) for name in ("jax", "libtpu")]
    described = repr(
        (plan.model, plan.slice.name, plan.slice.mesh, plan.layout, plan.weights, plan.kv, plan.padded_heads, plan.cache, bucket, versions)
    )
    return hashlib.sha256(described.encode()).hexdigest()[:24]


def row(case: Case, texts: Texts, most: int | None) -> dict[str, Any]:
    """The choice of a case and its rivals under the compiler's account."""
    report = search(load_model_config(case.model), parse_slice(case.slice), case.workload)
    able = [one for one in report.candidates if one.fits and report.plan_of(one).runnable is None]
    found = [judged(report, one, place, texts) for one, place in rivals(able, random.Random(f"{SEED} {case}"))[:most]]
    times = [line["compiled_ms"] for line in found if line["compiled_ms"] is not None]
    mine = found[0]["compiled_ms"]
    regret = None if mine is None or len(times) < 2 else mine / min(times) - 1
    return {"case": str(case), "candidates": found, "able": len(able), "regret": regret}


def judged(report: PlanReport, candidate: Candidate, place: str, texts: Texts) -> dict[str, Any]:
    """A line of the table."""
    plan, (bucket,) = serving_steps(report.plan_of(candidate), report.workload)
    plan = replace(plan, buckets=(bucket,))
    took = seconds(plan, bucket, texts)
    residual = "whole" if candidate.main.phase.whole else "split"
    line = {
        "layout": f"{candidate.name.split(',')[0]}, {roles_of(candidate.main)}, residual {residual}",
        "place": place,
        "layers": "one by one" if plan.unrolled else "in a loop",
        "planner_ms": 1e3 * candidate.main.step_seconds,
        "compiled_ms": None if took is None else 1e3 * took,
    }
    print(f"  {line['layout']:60} {place:20} {line['planner_ms']:9.4g} {line['compiled_ms'] or 0:9.4g}", flush=True)
    return line


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of all cases that were judged: regrets, and how far planner and compiler are apart."""
    regrets = [one["regret"] for one in rows if one["regret"] is not None]
    errors = [abs(line["planner_ms"] / line["compiled_ms"] - 1) for one in rows for line in one["candidates"] if line["compiled_ms"]]
    if not regrets:
        return {"cases": 0}
    return {
        "cases": len(regrets),
        "median": statistics.median(regrets),
        "worst": max(regrets),
        "programs": len(errors),
        "error_median": statistics.median(errors),
        "error_worst": max(errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--compiled", action="store_true", help="compile nothing")
    parser.add_argument("--most", type=int, help="programs of each case (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this text; nothing is written")
    args = parser.parse_args()
    args.texts.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in compiled_cases():
        if args.only in str(case):
            print(case, flush=True)
            rows.append(row(case, Texts(args.texts, not args.compiled), args.most))
            print(f"  regret {rows[-1]['regret']:.1%}" if rows[-1]["regret"] is not None else "  not judged", flush=True)
    found = summary(rows)
    if not args.only:
        write(__file__, {"summary": found, "rows": [one for one in rows if one["regret"] is not None]}, "compiled.json")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
