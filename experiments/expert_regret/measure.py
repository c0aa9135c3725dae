"""The planner's choice for mixtures of experts against its nearest rivals, compiled for their slices and read.

    python -m experiments.expert_regret.measure TEXTS              # half a minute per program; writes README's table
    python -m experiments.expert_regret.measure TEXTS --most 10    # so many programs at most

Twelve cases: three published models on four slices. Compiled are the choice and the best candidates that divide the experts or the dense
weights otherwise: three layers each, of which the last stands for the others, and 2048 tokens of the vocabulary
(`experiments.planner_regret.compiled`). A rival that at the maker's figures takes longer than the best program before it is not compiled.
Every case has its choice and one rival first, then a second and a third. TEXTS keeps what the compiler printed, so that a run goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from experiments.planner_regret.compiled import Texts, seconds
from experiments.results import next_to, write
from partinf.buckets import serving_steps, split_of
from partinf.cost.calibration import ROOFLINE
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED
from partinf.cost.step import step_ledger
from partinf.hardware.slices import parse_slice
from partinf.layout import experts_name
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.planner.question import Question
from partinf.planner.report import PlanReport, answer
from partinf.planner.results import Candidate
from partinf.plans import Bucket, Plan
from partinf.proof.pace import stated_byte_rate
from partinf.workload import Workload

LAYERS, RIVALS = 3, 3
MOST_LAYERS = 32  # of a case, so that the largest model fits its slices
CASES = (
    ("qwen-3-30b-a3b", "v6e:2x2", Workload(batch=8, context_len=2048, phase="decode")),
    ("qwen-3-30b-a3b", "v6e:2x2", Workload(batch=128, context_len=1024, phase="decode")),
    ("qwen-3-30b-a3b", "v5e:2x4", Workload(batch=32, context_len=2048, phase="decode")),
    ("qwen-3-30b-a3b", "v5e:2x4", Workload(batch=8, input_len=1024, phase="prefill")),
    ("mixtral-8x7b", "v5e:2x4", Workload(batch=4, context_len=2048, phase="decode")),
    ("mixtral-8x7b", "v5e:2x4", Workload(batch=128, context_len=1024, phase="decode")),
    ("mixtral-8x7b", "v6e:2x2", Workload(batch=32, context_len=2048, phase="decode")),
    ("mixtral-8x7b", "v6e:2x2", Workload(batch=4, input_len=2048, phase="prefill")),
    ("qwen-3-235b-a22b", "v5e:4x4", Workload(batch=16, context_len=2048, phase="decode")),
    ("qwen-3-235b-a22b", "v5e:4x4", Workload(batch=256, context_len=512, phase="decode")),
    ("qwen-3-235b-a22b", "v6e:2x4", Workload(batch=16, context_len=2048, phase="decode")),
    ("qwen-3-235b-a22b", "v6e:2x4", Workload(batch=128, context_len=1024, phase="decode")),
)


def title(model: str, slice_: str, workload: Workload) -> str:
    length = workload.context_len if workload.phase == "decode" else workload.input_len
    return f"{model} on {slice_}, {workload.phase} {workload.batch} × {length}"


def cut(name: str) -> ModelConfig:
    model = load_model_config(name)
    layers = min(model.num_layers, MOST_LAYERS)
    return model if layers == model.num_layers else replace(model, name=f"{name}, {layers} layers", num_layers=layers)


def rivals(report: PlanReport) -> list[Candidate]:
    """The choice, then the best candidates of which each divides experts or dense weights as none before it, whichever axes do it."""
    sizes = report.slice.axis_sizes

    def roles(of: Iterable[tuple[str, Any]]) -> tuple[Any, ...]:
        return tuple(sorted((role.value, sizes[axis]) for axis, role in of))

    found: dict[object, Candidate] = {}
    for candidate in report.candidates:
        key = roles(candidate.layout.experts), roles(candidate.layout.storage)
        if candidate.fits and len(found) <= RIVALS and plan_of(report, candidate).runnable is None:
            found.setdefault(key, candidate)
    return list(found.values())


def plan_of(report: PlanReport, candidate: Candidate) -> Plan:
    workload = report.workload
    return Plan(report.model, report.slice, candidate.layout, workload.weights, workload.kv, padded_heads=candidate.padded_heads)


def judged(report: PlanReport, candidate: Candidate, texts: Texts, best_ms: float | None) -> dict[str, Any]:
    """A line of the table. `best_ms`: the least time of those before it, if there are any."""
    plan, (bucket,) = serving_steps(plan_of(report, candidate), report.workload)
    plan = replace(plan, buckets=(bucket,))
    least = 1e3 * least_seconds(plan, bucket)
    took = seconds(plan, bucket, texts, LAYERS) if best_ms is None or least < best_ms else None
    return {
        "layout": candidate.name.split(", prefill")[0],
        "experts": experts_name(candidate.layout, report.slice.axis_sizes),
        "planner_ms": 1e3 * candidate.main.step_seconds,
        "compiled_ms": None if took is None else 1e3 * took,
        "least_ms": least,
    }


def least_seconds(plan: Plan, bucket: Bucket) -> float:
    """What no program of a step is faster than: one read of what it needs of its weights, experts that are hit, and of its cache, or its
    bytes over the busiest axis, at the maker's figures and each as if it were alone."""
    entries = step_ledger(split_of(plan, bucket, Pricing(plan.slice, ROOFLINE, program=TILED))).entries
    rate = stated_byte_rate(plan.slice.chip)
    read = sum(one.count * min(one.seconds, (one.weight_bytes + one.kv_bytes) / rate) for one in entries if one.op is None)
    moved = [sum(one.seconds * one.count for one in entries if one.op is not None and axis in one.axes) for axis in plan.axis_sizes]
    return plan.num_stages * max(read, *moved)


def best_ms(rows: list[dict[str, Any]]) -> float | None:
    return min((row["compiled_ms"] for row in rows if row["compiled_ms"]), default=None)


def summary(cases: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Of the cases of which the choice and a rival are judged: regrets, and how far planner and compiler are apart."""
    regrets = [found for rows in cases.values() if (found := regret(rows)) is not None]
    errors = [abs(row["planner_ms"] / row["compiled_ms"] - 1) for rows in cases.values() for row in rows if row["compiled_ms"]]
    if not regrets:
        return {"cases": 0}
    of_planner = {"programs": len(errors), "error_median": statistics.median(errors), "error_worst": max(errors)}
    return {"cases": len(regrets), "median": statistics.median(regrets), "worst": max(regrets)} | of_planner


def regret(rows: list[dict[str, Any]]) -> float | None:
    if len(rows) < 2 or not rows[0]["compiled_ms"]:
        return None
    return float(rows[0]["compiled_ms"] / (best_ms(rows) or 1.0) - 1)


def table(cases: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| case | compiled ms (by the planner), in the planner's order | regret |", "|---|---|---|"]
    for name, rows in cases.items():
        cells = [f"{row['layout']}: {time_of(row)} ({row['planner_ms']:.4g})" for row in rows]
        found = regret(rows)
        lines.append(f"| {name} | {'<br>'.join(cells)} | {'one program' if found is None else f'{found:.1%}'} |")
    return "\n".join(lines)


def time_of(row: dict[str, Any]) -> str:
    return f"{row['compiled_ms']:.4g}" if row["compiled_ms"] else f"at least {row['least_ms']:.4g}, not compiled"


def show(found: dict[str, Any]) -> None:
    """Write the page's figures."""
    summary = found["summary"]
    line = f"{summary['cases']} of {len(CASES)} cases compiled {found['date']}"
    if summary["cases"]:
        line += f": median regret {summary['median']:.1%}, worst {summary['worst']:.1%}; {summary['programs']} programs, by the planner "
        line += f"{summary['error_median']:.0%} off in the median, {summary['error_worst']:.0%} at worst"
    page = next_to(__file__, "README.md")
    before, _, after = page.read_text().partition("<!-- table -->")
    page.write_text(f"{before}<!-- table -->\n{line}.\n\n{table(found['rows'])}\n<!-- end -->{after.partition('<!-- end -->')[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--most", type=int, default=len(CASES) * (RIVALS + 1), help="programs compiled at most")
    args = parser.parse_args()
    args.texts.mkdir(parents=True, exist_ok=True)
    cases: dict[str, list[dict[str, Any]]] = {title(*case): [] for case in CASES}
    reports = {title(*case): answer(Question(cut(case[0]), case[2]), parse_slice(case[1])) for case in CASES}
    before = len(list(args.texts.iterdir()))
    for number in (0, *range(1, RIVALS + 1)):
        for name, rows in cases.items():
            chosen = rivals(reports[name])
            if number < len(chosen):
                compiling = len(list(args.texts.iterdir())) - before < args.most
                rows.append(judged(reports[name], chosen[number], Texts(args.texts, compiling), best_ms(rows)))
                print(name, rows[-1], flush=True)
    found = {"date": str(date.today()), "rows": {name: [row for row in rows if known(row, rows)] for name, rows in cases.items()}}
    found |= {"summary": summary(found["rows"])}
    write(__file__, found)
    show(found)


def known(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether a line says anything: compiled, or by its floor slower than what is."""
    return bool(row["compiled_ms"] or row["least_ms"] >= (best_ms(rows) or row["least_ms"] + 1))


if __name__ == "__main__":
    main()
