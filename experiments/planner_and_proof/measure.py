"""Planner and proof side by side over the twelve steps, by kind of work, and what the compiler says of prompts' tiles.

    python -m experiments.planner_and_proof.measure TEXTS    # compiles what is missing, prints, writes results.json

TEXTS: a folder that keeps what the compiler said. Without a TPU.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from experiments.planner_and_proof.compile import main as compile_missing
from experiments.planner_and_proof.compile import said
from experiments.planner_and_proof.steps import STEPS, Step, planned
from experiments.results import write
from partinf.cost.items import What
from partinf.cost.ledger import Ledger
from partinf.proof.proving import planned_ledger, schedule_of
from partinf.proof.report import Work
from partinf.proof.schedule import Schedule
from partinf.transformer.routes import Routes

KINDS = ("products", "attention", "collectives", "other")
_KIND_OF = {What.PRODUCT: "products", What.TABLE: "products", What.CORE: "attention"}
_PRODUCTS = ("multiply", "logits", "dot")  # functions in which matrices are multiplied
_CORES = ("partinf/transformer/kernels/tiles.py", "partinf/transformer/kernels/paged_decode.py")


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


def tiles(step: Step, schedule: Schedule) -> dict[str, float]:
    """What the compiled loop over a prompt's tiles takes: a score beside its products, a pair of tiles, a tile of queries."""
    plan, bucket = planned(step)
    routes, rows = Routes(plan, bucket), plan.slice.chip.platform.tiles
    ways = routes.ways(routes.prefill.batch)
    heads = plan.padded_model.num_heads // routes.ways(routes.prefill.heads)
    tokens, slots = bucket.prefill_tokens // ways, bucket.prefill_slots // ways
    queries, pairs = rows.count(tokens, tokens, heads)
    layers, seen = plan.model.num_layers, rows.seen_shares(tokens, slots, heads)[0]
    spent: dict[str, float] = defaultdict(float)
    for work in schedule.work:
        where, function = work.source_op, work.source_op.rpartition(" ")[2]
        if where.startswith(_CORES[0]):
            visited = function.endswith("tile") or work.count > 1.01 * queries * layers
            spent["score" if "_absorb" in function else "pair" if visited else "queries"] += work.seconds * work.count
    scores = seen * pairs * min(rows.queries(heads), tokens) * min(rows.prompt_keys, tokens) * heads
    flops = 4.0 * plan.model.head_dim / (plan.slice.chip.peak_bf16 / plan.slice.chip.devices_per_chip)
    return {
        "score": spent["score"] / layers / scores - flops,
        "pair": spent["pair"] / layers / pairs,
        "queries": spent["queries"] / layers / queries,
    }


def row(step: Step, texts: Path) -> dict[str, Any]:
    plan, bucket = planned(step)
    schedule, ledger = schedule_of(plan, bucket, said(step, texts).program), planned_ledger(plan, bucket)
    found: dict[str, Any] = {"step": step.name, "bucket": str(bucket), "planner": ledger.seconds, "proof": schedule.seconds}
    found |= {"ratio": ledger.seconds / schedule.seconds, "planner_by_kind": by_kind(ledger), "proof_by_kind": proved(schedule)}
    return found | ({"tiles": tiles(step, schedule)} if step.phase == "prefill" else {})


def main(texts: Path) -> None:
    compile_missing(texts, [])
    rows = [row(step, texts) for step in STEPS]
    print("| step | planner ms | proof ms | ratio |" + "".join(f" {kind} |" for kind in KINDS))
    print("|---" * (4 + len(KINDS)) + "|")
    for one in rows:
        kinds = "".join(f" {1e3 * one['planner_by_kind'][kind]:.3g} / {1e3 * one['proof_by_kind'][kind]:.3g} |" for kind in KINDS)
        print(f"| {one['step']} | {1e3 * one['planner']:.4g} | {1e3 * one['proof']:.4g} | {one['ratio']:.2f} |{kinds}")
    for one in rows:
        if "tiles" in one:
            score, pair, queries = one["tiles"].values()
            print(
                f"{one['step']}: a score {1e12 * score:.3g} ps, a pair of tiles {1e6 * pair:.3g}, a tile of queries {1e6 * queries:.3g} us"
            )
    errors = [abs(one["ratio"] - 1) for one in rows]
    summary = {"median": statistics.median(errors), "worst": max(errors)}
    print(f"median {summary['median']:.1%}, worst {summary['worst']:.1%}")
    write(__file__, {"summary": summary, "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
