"""What the network between slices should split, by the planner: layers (pipeline stages), tensors, or the batch (copies of the weights).

    python -m experiments.stages_across_dcn.measure        # a minute, writes results.json and prints the tables

For each model on slices joined by a data-centre network: the best layout under each role of that axis, over the batch of a decode step and
over the prompts of a prefill step, with where the time goes. Nothing is run.
"""

from __future__ import annotations

import sys
from typing import Any

from experiments.results import place, write
from partinf.cost.ledger import EntryKind, Op
from partinf.hardware.slices import DCN_AXIS, parse_slice
from partinf.layout import Role
from partinf.model.load import load_model_config
from partinf.planner.report import PlanReport, search
from partinf.planner.results import Candidate
from partinf.workload import DType, Workload

CASES = (
    ("gpt3-175b", "a100-40:8*2", DType.BF16),
    ("gpt3-341b", "a100-40:8*4", DType.BF16),
    ("llama-3-70b", "v5e:4x4*2", DType.INT8),
    ("palm-540b", "v4:4x4x4*2", DType.BF16),
)
BATCHES = (1, 4, 16, 64, 256)
PROMPTS = (1, 4, 16)
CONTEXT = 2048
ROLES = {Role.STAGE: "stages", Role.FFN: "tensors", Role.REPLICA: "copies"}


def between(candidate: Candidate) -> float:
    """Seconds that collectives over the network between slices take."""
    return sum(e.exposed_seconds for e in candidate.main.ledger.entries if e.op is not None and DCN_AXIS in e.axes)


def under(report: PlanReport, role: Role) -> dict[str, Any] | None:
    """The best candidate with this role between slices."""
    mine = [c for c in report.candidates if dict(c.layout.storage)[DCN_AXIS] is role]
    if not mine:
        return None
    best = mine[0]
    entries = best.main.ledger.entries
    weights = sum(e.exposed_seconds for e in entries if e.kind is EntryKind.MATMUL)
    permutes = sum(e.exposed_seconds for e in entries if e.op is Op.PERMUTE)
    return {
        "layout": best.name,
        "fits": best.fits,
        "ms": 1e3 * best.main.step_seconds,
        "products_ms": 1e3 * weights,
        "between_slices_ms": 1e3 * between(best),
        "to_the_next_stage_ms": 1e3 * permutes,
        "collectives_between_slices": sum(e.count for e in entries if e.op is not None and DCN_AXIS in e.axes),
        "gb_per_device": best.memory.total / 1e9,
    }


def rows(model: str, slice_: str, weights: DType) -> list[dict[str, Any]]:
    """One row for each batch of decode and each number of prompts of prefill."""
    config, where = load_model_config(model), parse_slice(slice_)
    workloads = [Workload(batch, context_len=CONTEXT, phase="decode", weights=weights) for batch in BATCHES]
    workloads += [Workload(prompts, input_len=CONTEXT, phase="prefill", weights=weights) for prompts in PROMPTS]
    found = []
    for workload in workloads:
        report = search(config, where, workload)
        found.append({"phase": workload.phase, "batch": workload.batch} | {name: under(report, role) for role, name in ROLES.items()})
        print(f"{model} on {slice_}: {workload.phase} {workload.batch}", file=sys.stderr)
    return found


def table(case: str, found: list[dict[str, Any]]) -> str:
    lines = [f"**{case}**", "", "| step | stages, ms | tensors, ms | copies, ms | between slices: stages, tensors, ms | best that fits |"]
    lines.append("|---|---|---|---|---|---|")
    for row in found:
        cells = []
        for name in ROLES.values():
            one = row[name]
            shown = "–" if one is None else f"{one['ms']:,.0f}" if one["ms"] >= 100 else f"{one['ms']:.3g}"
            cells.append(shown + (" (does not fit)" if one and not one["fits"] else ""))
        fitting = {name: row[name]["ms"] for name in ROLES.values() if row[name] is not None and row[name]["fits"]}
        best = min(fitting, key=lambda name: fitting[name]) if fitting else "none"
        spent = ", ".join(f"{row[name]['between_slices_ms']:.3g}" for name in ("stages", "tensors") if row[name])
        lines.append(f"| {row['phase']} {row['batch']} | {' | '.join(cells)} | {spent} | {best} |")
    return "\n".join(lines)


def main() -> int:
    results = {f"{model} on {slice_}, {weights}": rows(model, slice_, weights) for model, slice_, weights in CASES}
    write(__file__, results)
    tables = "\n\n".join(table(case, found) for case, found in results.items())
    print(tables)
    place(__file__, tables)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
