"""Planner and proof side by side over the twelve steps, by kind of work.

    python -m experiments.planner_and_proof.measure TEXTS    # compiles what is missing, prints, writes results.json

TEXTS: a folder that keeps what the compiler printed. Without a TPU.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from experiments.planner_and_proof.compile import compiled_of
from experiments.planner_and_proof.compile import main as compile_missing
from experiments.planner_and_proof.steps import STEPS, Step, planned
from experiments.results import write
from partinf.cost.items import What
from partinf.cost.ledger import Ledger
from partinf.proof.proving import planned_ledger, schedule_of
from partinf.proof.report import Work
from partinf.proof.schedule import Schedule

KINDS = ("products", "attention", "collectives", "other")
_KIND_OF = {What.PRODUCT: "products", What.TABLE: "products", What.CORE: "attention"}
_PRODUCTS = ("multiply", "logits", "dot", "_by_xla")  # functions in which matrices are multiplied
_CORES = tuple(f"partinf/transformer/kernels/{name}.py" for name in ("tiles", "paged_decode", "prompt"))


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


def row(step: Step, texts: Path) -> dict[str, Any]:
    plan, bucket = planned(step)
    schedule, ledger = schedule_of(plan, bucket, compiled_of(step, texts).program), planned_ledger(plan, bucket)
    found: dict[str, Any] = {"step": step.name, "bucket": str(bucket), "planner": ledger.seconds, "proof": schedule.seconds}
    found |= {"layers": "one by one" if plan.unrolled else "in a loop", "ratio": ledger.seconds / schedule.seconds}
    return found | {"planner_by_kind": by_kind(ledger), "proof_by_kind": proved(schedule)}


def main(texts: Path) -> None:
    compile_missing(texts, [])
    rows = [row(step, texts) for step in STEPS]
    print("| step | layers | planner ms | proof ms | ratio |" + "".join(f" {kind} |" for kind in KINDS))
    print("|---" * (5 + len(KINDS)) + "|")
    for one in rows:
        kinds = "".join(f" {1e3 * one['planner_by_kind'][kind]:.3g} / {1e3 * one['proof_by_kind'][kind]:.3g} |" for kind in KINDS)
        print(f"| {one['step']} | {one['layers']} | {1e3 * one['planner']:.4g} | {1e3 * one['proof']:.4g} | {one['ratio']:.2f} |{kinds}")
    errors = [abs(one["ratio"] - 1) for one in rows]
    summary = {"median": statistics.median(errors), "worst": max(errors)}
    print(f"median {summary['median']:.1%}, worst {summary['worst']:.1%}")
    write(__file__, {"summary": summary, "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
