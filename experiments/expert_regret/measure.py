"""The planner's choice for mixtures of experts against its nearest rivals, compiled for their slices and read.

    python -m experiments.expert_regret.measure              # half a minute per program; goes on where it stopped; writes README's table
    python -m experiments.expert_regret.measure --most 10    # so many programs at most

Twelve cases: three published models, each cut to two of its layers so that compiling stays bearable, on four slices. Compiled are the
choice and the best candidates that divide the experts or the dense weights otherwise; a step takes what the proof of its program says.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from typing import Any

from experiments.results import next_to, read, write
from partinf.buckets import serving_steps
from partinf.hardware.slices import parse_slice
from partinf.layout import experts_name
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.planner.question import Question
from partinf.planner.report import PlanReport, answer
from partinf.planner.results import Candidate
from partinf.plans import Plan
from partinf.proof import Limits, prove
from partinf.workload import Workload

LAYERS, RIVALS = 2, 3
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
    return replace(load_model_config(name), name=f"{name}, {LAYERS} layers", num_layers=LAYERS)


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


def compiled(report: PlanReport, candidate: Candidate) -> dict[str, Any]:
    plan, buckets = serving_steps(plan_of(report, candidate), report.workload)
    step = prove(plan, buckets, Limits(seconds=3600)).steps[0]
    return {
        "layout": candidate.name,
        "experts": experts_name(candidate.layout, report.slice.axis_sizes),
        "planner_ms": 1e3 * candidate.main.step_seconds,
        "compiled_ms": None if step.estimate is None else 1e3 * step.estimate.seconds,
        "copies_ms": 1e3 * sum(one.seconds for one in step.differences if one.kind == "extra copy"),
    }


def summary(cases: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Of the cases of which every program is compiled."""
    regrets = [regret(rows) for rows in cases.values() if len(rows) == RIVALS + 1]
    return {"cases": len(regrets), "median": statistics.median(regrets), "worst": max(regrets)} if regrets else {"cases": 0}


def regret(rows: list[dict[str, Any]]) -> float:
    return float(rows[0]["compiled_ms"] / min(row["compiled_ms"] for row in rows) - 1)


def table(cases: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| case | compiled ms (by the planner), in the planner's order | regret |", "|---|---|---|"]
    for name, rows in cases.items():
        cells = [f"{row['layout'].split(', prefill')[0]}: {row['compiled_ms']:.4g} ({row['planner_ms']:.4g})" for row in rows]
        lines.append(f"| {name} | {'<br>'.join(cells)} | {f'{regret(rows):.1%}' if len(rows) > RIVALS else 'not all compiled'} |")
    return "\n".join(lines)


def show(found: dict[str, Any]) -> None:
    """Write the page's figures."""
    summary = found["summary"]
    line = f"{summary['cases']} of {len(CASES)} cases compiled {found['date']}"
    if summary["cases"]:
        line += f": median regret {summary['median']:.1%}, worst {summary['worst']:.1%}"
    page = next_to(__file__, "README.md")
    before, _, after = page.read_text().partition("<!-- table -->")
    page.write_text(f"{before}<!-- table -->\n{line}.\n\n{table(found['rows'])}\n<!-- end -->{after.partition('<!-- end -->')[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=len(CASES) * (RIVALS + 1), help="programs compiled at most")
    left = parser.parse_args().most
    found = read(__file__, missing={"rows": {}})
    for model, slice_, workload in CASES:
        rows = found["rows"].setdefault(title(model, slice_, workload), [])
        if left <= 0 or len(rows) > RIVALS:
            continue
        report = answer(Question(cut(model), workload), parse_slice(slice_))
        for candidate in rivals(report)[len(rows) :][:left]:
            rows.append(compiled(report, candidate))
            left -= 1
            found |= {"date": str(date.today()), "summary": summary(found["rows"])}
            write(__file__, found)
            print(title(model, slice_, workload), rows[-1], flush=True)
    found["rows"] = {name: rows for name, rows in found["rows"].items() if rows}
    show(found)


if __name__ == "__main__":
    main()
