"""A third opinion: the planner's choice and its rivals, compiled for their TPU slice and read as `partinf prove` reads a plan.

    python -m experiments.planner_regret.compiled TEXTS             # hours of one core, no TPU; writes compiled.json, prints the table
    python -m experiments.planner_regret.compiled TEXTS --most 6    # of each case so many programs, the choice and its nearest first
    python -m experiments.planner_regret.compiled TEXTS --compiled  # only of programs that are compiled already

TEXTS: a folder that keeps what the compiler printed for each program, so that a run can be resumed; it belongs to one state of the library.
Every candidate is judged as the engine would run it: its roles, the residual that the planner chose with them, layers one by one or in a
loop as its plan has them. What costs most to compile is left small: of layers that are compiled one by one there are five, and what passes
from the second one's attention to the fifth's stands for the others; the vocabulary has 2048 tokens, and what more of them takes is the
planner's own account. A rival that at the maker's figures takes longer than the best program compiled before it is not compiled: it cannot
be the best, and the regret is the same without it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.planner_regret.cases import SEED, Case, compiled_cases
from experiments.results import write
from partinf.buckets import serving_steps, split_of
from partinf.cost.calibration import ROOFLINE
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED
from partinf.cost.step import step_ledger
from partinf.hardware.slices import parse_slice
from partinf.layout import AttentionRole, Role
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.report import PlanReport
from partinf.planner.results import Candidate
from partinf.planner.show.work import roles_of
from partinf.plans import Bucket, Plan
from partinf.proof.process import Compiled, CompilerFailed, Limits, compile_bucket
from partinf.proof.proving import planned_ledger, schedule_of
from partinf.proof.schedule import Schedule

DEPTH, VOCABULARY = 5, 2048
KERNELS = ("paged_decode", "prompt_attention", "paged_write")  # of every layer, the first that there is
NEAREST, RANDOM = 4, 4
LIMITS = Limits(seconds=600)


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


def rivals(ranked: Sequence[Candidate], draw: random.Random) -> list[tuple[Candidate, str]]:
    """The choice, its nearest rivals, the best of every named class, and some of the rest, in the order in which they are judged."""
    found = [(ranked[0], "choice"), *((one, "near") for one in ranked[1:2])]
    for name in ("1D", "2D", "copies", "sequence", "weight-gathered"):
        first = next((one for one in ranked if name in classes(one)), None)
        if first is not None and all(first is not one for one, _ in found):
            found.append((first, f"best {name}"))
    known = {id(one) for one, _ in found}
    found += [(one, "near") for one in ranked[2 : 1 + NEAREST] if id(one) not in known]
    known = {id(one) for one, _ in found}
    rest = sorted((one for one in ranked if id(one) not in known), key=lambda one: (one.name, roles_of(one.main)))  # whatever their prices
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
            try:
                compiled = compile_bucket(plan, bucket, LIMITS)
            except CompilerFailed as failed:
                compiled = Compiled("", 0.0, {}, "", str(failed))
            path.write_bytes(gzip.compress(json.dumps(asdict(compiled)).encode()))
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))


def seconds(plan: Plan, bucket: Bucket, texts: Texts, unrolled: int = DEPTH) -> float | None:
    """A step of a plan by its compiled program; None where the compiler refuses it, or it is not compiled. Of pipeline stages, all the
    ticks of one batch.

    Args:
        unrolled: layers that are compiled where they are compiled one by one, three or more.
    """
    layers = plan.model.num_layers
    small = replace(plan, model=replace(plan.model, vocab_size=VOCABULARY))
    ends = planned_ledger(plan, bucket).seconds - planned_ledger(small, bucket).seconds
    shallow = cut(plan, unrolled)
    depth = shallow.model.num_layers
    schedule = walked(shallow, bucket, texts)
    if schedule is None:
        return None
    each = layer_seconds(schedule, depth) if depth < layers else 0.0
    return plan.num_stages * (schedule.seconds + (layers - depth) * each + ends)


def cut(plan: Plan, unrolled: int = DEPTH) -> Plan:
    """The plan of the program that is compiled for it."""
    layers = unrolled if plan.unrolled else plan.model.num_layers
    return replace(plan, model=replace(plan.model, vocab_size=VOCABULARY, num_layers=layers))


def programs(texts: Texts) -> Iterator[tuple[Plan, str]]:
    """What is compiled of every case, each program with its plan."""
    for case in compiled_cases():
        report = search(load_model_config(case.model), parse_slice(case.slice), case.workload)
        for one, _ in rivals(able(report), random.Random(f"{SEED} {case}")):
            plan, (bucket,) = serving_steps(report.plan_of(one), report.workload)
            shallow = cut(replace(plan, buckets=(bucket,)))
            compiled = texts.compiled(shallow, bucket)
            if compiled is not None and not compiled.refusal:
                yield shallow, compiled.program


def able(report: PlanReport) -> list[Candidate]:
    """The candidates that fit and run, best first."""
    return [one for one in report.candidates if one.fits and report.plan_of(one).runnable is None]


def layer_seconds(schedule: Schedule, depth: int) -> float:
    """What a layer in the middle takes: from one of its kernels to that of the next. The first ones read ahead otherwise, and behind
    the last one are the logits.

    Raises:
        ValueError: no kernel runs equally often in every layer.
    """
    begun = next((schedule.begun[name] for name in KERNELS if schedule.begun.get(name)), ())
    each, rest = divmod(len(begun), depth)
    if not begun or rest:
        raise ValueError(f"{len(begun)} kernels in {depth} layers")
    return (begun[(depth - 1) * each] - begun[each]) / (depth - 2)


def walked(plan: Plan, bucket: Bucket, texts: Texts) -> Schedule | None:
    """One compiled program, read."""
    compiled = texts.compiled(plan, bucket)
    return None if compiled is None or compiled.refusal else schedule_of(plan, bucket, compiled.program)


def least_seconds(plan: Plan, bucket: Bucket) -> float:
    """What no program of a step is faster than, all its layers: its products at the peak, one read of its weights and cache, or its bytes
    over the busiest axis, at the maker's figures and each as if it were alone."""
    ledger = step_ledger(split_of(plan, bucket, Pricing(plan.slice, ROOFLINE, program=TILED)))
    chip = plan.slice.chip
    collectives = [entry for entry in ledger.entries if entry.op is not None]
    moved = [sum(one.seconds * one.count for one in collectives if axis in one.axes) for axis in plan.axis_sizes]
    computed = ledger.flops / chip.peak_bf16 * chip.devices_per_chip
    read = (ledger.weight_bytes + ledger.kv_bytes) / chip.hbm_bandwidth * chip.devices_per_chip
    return plan.num_stages * max(computed, read, *moved)


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
    rest = able(report)
    found: list[dict[str, Any]] = []
    for one, place in rivals(rest, random.Random(f"{SEED} {case}"))[:most]:
        times = [line["compiled_ms"] for line in found if line["compiled_ms"]]
        found.append(judged(report, one, place, texts, min(times, default=None)))
    times = [line["compiled_ms"] for line in found if line["compiled_ms"]]
    mine = found[0]["compiled_ms"]
    regret = None if mine is None or len(times) < 2 else mine / min(times) - 1
    judged_ones = sum(bool(line["compiled_ms"]) or line["ruled_out"] for line in found)
    return {"case": str(case), "candidates": found, "able": len(rest), "regret": regret, "judged": judged_ones}


def judged(report: PlanReport, candidate: Candidate, place: str, texts: Texts, best_ms: float | None) -> dict[str, Any]:
    """A line of the table. `best_ms`: the least time of those before it, if there are any."""
    plan, (bucket,) = serving_steps(report.plan_of(candidate), report.workload)
    plan = replace(plan, buckets=(bucket,))
    least = 1e3 * least_seconds(plan, bucket)
    took = seconds(plan, bucket, texts) if best_ms is None or least < best_ms else None
    residual = "whole" if candidate.main.phase.whole else "split"
    line = {
        "layout": f"{candidate.name.split(',')[0]}, {roles_of(candidate.main)}, residual {residual}",
        "place": place,
        "layers": "one by one" if plan.unrolled else "in a loop",
        "planner_ms": 1e3 * candidate.main.step_seconds,
        "compiled_ms": None if took is None else 1e3 * took,
        "least_ms": least,
        "ruled_out": best_ms is not None and least >= best_ms,
    }
    figure = f"{1e3 * took:9.4g}" if took is not None else f" above {least:.4g}" if line["ruled_out"] else "  not judged"
    print(f"  {line['layout']:60} {place:20} {line['planner_ms']:9.4g} {figure}", flush=True)
    return line


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of all cases that were judged: regrets, and how far planner and compiler are apart."""
    regrets = [one["regret"] for one in rows if one["regret"] is not None]
    errors = [abs(line["planner_ms"] / line["compiled_ms"] - 1) for one in rows for line in one["candidates"] if line["compiled_ms"]]
    if not regrets:
        return {"cases": 0}
    return {
        "cases": len(regrets),
        "cases_with_all_rivals": sum(one["regret"] is not None and one["judged"] == len(one["candidates"]) for one in rows),
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
