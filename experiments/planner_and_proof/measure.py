"""Planner and proof side by side over the twelve steps, by kind of work.

    python -m experiments.planner_and_proof.measure TEXTS    # compiles what is missing, writes results.json and the tables of the README

TEXTS: a folder that keeps what the compiler printed. Without a TPU.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path
from typing import Any

from experiments.planner_and_proof.compile import compiled_of
from experiments.planner_and_proof.compile import main as compile_missing
from experiments.planner_and_proof.steps import STEPS, Step, planned
from experiments.results import place, write
from partinf.cost.calibration import calibration_for
from partinf.cost.items import DECODE, PREFILL, SMALL, What
from partinf.cost.ledger import Ledger
from partinf.cost.program import TILED
from partinf.plans import Plan
from partinf.proof.proving import planned_ledger, schedule_of
from partinf.proof.report import Work
from partinf.proof.schedule import Schedule

KINDS = ("products", "attention", "collectives", "other")
_KIND_OF = {What.PRODUCT: "products", What.TABLE: "products", What.CORE: "attention"}
_PRODUCTS = ("multiply", "logits", "dot", "_by_xla")  # functions in which matrices are multiplied
_CORES = tuple(f"partinf/transformer/kernels/{name}.py" for name in ("tiles", "paged_decode", "prompt"))
_PASSES = (SMALL, DECODE.passes, PREFILL.passes)


def by_kind(ledger: Ledger) -> dict[str, float]:
    """What the planner says, in seconds."""
    found = dict.fromkeys(KINDS, 0.0)
    for entry in ledger.entries:
        found["collectives" if entry.op else _KIND_OF.get(entry.item.what, "other")] += entry.exposed_seconds
    return found


def kind_of(work: Work) -> str:
    """Of an instruction, by the line of ours that it comes from."""
    if work.source_op.startswith(_CORES):
        return "attention"
    return "products" if any(name in work.source_op.rpartition(" ")[2] for name in _PRODUCTS) else "other"


def proved(schedule: Schedule) -> dict[str, float]:
    """What the compiled program says, in seconds."""
    found = dict.fromkeys(KINDS, 0.0)
    for work in schedule.work:
        found[kind_of(work)] += work.seconds * work.count
    return found | {"collectives": sum(one.exposed_seconds for one in schedule.collectives)}


def passed(plan: Plan, ledger: Ledger) -> float:
    """Elements that the small operations of all layers pass over, as the planner counts them."""
    one = calibration_for(plan.slice.chip)
    times = TILED.small_operations * one.layer_seconds * plan.model.num_layers  # of small operations, whatever they pass over
    seconds = sum(entry.seconds * entry.count for entry in ledger.entries if entry.item in _PASSES)
    return (seconds - times) / one.element_seconds


def passing(plan: Plan, schedule: Schedule) -> float:
    """Seconds that the compiled program passes over elements in its layers: all but products, kernels, collectives and waits."""
    found: dict[str, tuple[int, float]] = {}
    for work in schedule.work:
        if (kind_of(work) == "products") or work.what.startswith(("kernel", "waiting")):
            continue
        key = re.sub(r"\[\d+\]\[", "[][", work.what) + work.source_op  # the same of all layers
        count, seconds = found.get(key, (0, 0.0))
        found[key] = count + work.count, seconds + work.seconds * work.count
    return sum(seconds for count, seconds in found.values() if count >= plan.model.num_layers - 1)


def row(step: Step, texts: Path) -> dict[str, Any]:
    plan, bucket = planned(step)
    schedule, ledger = schedule_of(plan, bucket, compiled_of(step, texts).program), planned_ledger(plan, bucket)
    found: dict[str, Any] = {"step": step.name, "bucket": str(bucket), "planner": ledger.seconds, "proof": schedule.seconds}
    found |= {"layers": "one by one" if plan.unrolled else "in a loop", "ratio": ledger.seconds / schedule.seconds}
    found |= {"planner_by_kind": by_kind(ledger), "proof_by_kind": proved(schedule)}
    if bucket.prefill_tokens:
        found |= {"elements": passed(plan, ledger), "passing": passing(plan, schedule)}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown, with the errors below."""
    lines = ["| step | layers | planner ms | proof ms | ratio |" + "".join(f" {kind} (planner / proof) |" for kind in KINDS)]
    lines.append("|---" * (5 + len(KINDS)) + "|")
    for one in rows:
        kinds = "".join(f" {1e3 * one['planner_by_kind'][kind]:.3g} / {1e3 * one['proof_by_kind'][kind]:.3g} |" for kind in KINDS)
        times = f"{1e3 * one['planner']:.4g} | {1e3 * one['proof']:.4g} | {one['ratio']:.2f}"
        lines.append(f"| {one['step']} | {one['layers']} | {times} |{kinds}")
    errors = summary(rows)
    return "\n".join([*lines, "", f"**Median {errors['median']:.1%}, worst {errors['worst']:.1%} (the goals were 10 and 25 %).**"])


def elements(rows: list[dict[str, Any]]) -> str:
    """What an element takes that small operations pass over, by the prompts of each chip: evidence of `Calibration.element_seconds`."""
    lines = ["| prompt | elements, millions | passing, ms | ps per element |", "|---" * 4 + "|"]
    for one in rows:
        if "elements" in one:
            each = 1e12 * one["passing"] / one["elements"]
            lines.append(f"| {one['step']} | {one['elements'] / 1e6:,.0f} | {1e3 * one['passing']:.3g} | {each:.1f} |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    errors = [abs(one["ratio"] - 1) for one in rows]
    return {"median": statistics.median(errors), "worst": max(errors)}


def main(texts: Path) -> None:
    compile_missing(texts, [])
    rows = [row(step, texts) for step in STEPS]
    print(table(rows), elements(rows), sep="\n\n")
    write(__file__, {"summary": summary(rows), "rows": rows})
    place(__file__, table(rows))
    place(__file__, elements(rows), "elements")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
