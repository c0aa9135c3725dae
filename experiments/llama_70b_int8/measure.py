"""Which slice holds Llama 3 70B in int8, by the TPU compiler: `python -m experiments.llama_70b_int8.measure` writes results.json.

For each chip, slices are tried from small to large, beginning with the largest that the planner says is too small; on each the planner's
best layout is compiled, decode of the whole batch and prefill of one prompt, until both fit. No TPU takes part.

`--planner` compiles nothing and writes what the planner says of the same slices to results_planner.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments.results import place, read, write
from partinf.buckets import serving_steps
from partinf.hardware.chips import chips
from partinf.hardware.slices import Slice
from partinf.layout import readable_name
from partinf.model.load import load_model_config
from partinf.planner.report import search
from partinf.planner.slices import slices_of
from partinf.plans import Bucket, Plan
from partinf.proof import CompilerFailed, Limits, prove
from partinf.proof.proving import planned_ledger
from partinf.workload import DType, Workload

CHIPS = ("v5e", "v6e", "v5p")
MOST = 16  # chips
WORKLOAD = Workload(batch=32, input_len=1920, output_len=128, prefill_batch=1, weights=DType.INT8, kv=DType.BF16)


def planned(slice_: Slice) -> tuple[dict[str, Any], Plan, tuple[Bucket, ...]]:
    """What the planner says of one slice, and its best plan with the steps that serve the workload."""
    report = search(load_model_config("llama-3-70b"), slice_, WORKLOAD)
    best = next(candidate for candidate in report.candidates if report.plan_of(candidate).runnable is None)
    plan, buckets = serving_steps(report.plan_of(best), WORKLOAD)
    found = {
        "slice": slice_.name,
        "chips": slice_.num_chips,
        "layout": readable_name(plan.layout, plan.axis_sizes),
        "planner_fits": best.fits,
        "planner_bytes": best.memory.total,
        "usable_bytes": best.memory.usable,
    }
    return found, plan, buckets


def by_planner(slice_: Slice) -> dict[str, Any]:
    """What the planner says of one slice and of its steps."""
    found, plan, buckets = planned(slice_)
    steps = [{"step": str(bucket), "planned_seconds": planned_ledger(plan, bucket).seconds} for bucket in buckets]
    return found | {"fits": found["planner_fits"], "steps": steps}


def tried(slice_: Slice) -> dict[str, Any]:
    """What the planner and the compiler say of one slice."""
    found, plan, buckets = planned(slice_)
    started = time.monotonic()
    try:
        proof = prove(plan, buckets, Limits(seconds=600, memory_bytes=12 << 30))
    except CompilerFailed as error:
        return found | {"failed": str(error)}
    steps = [
        {
            "step": step.bucket,
            "fits": step.fits,
            "needed_bytes": step.memory.needed,
            "usable_bytes": step.memory.usable,
            "estimate_seconds": None if step.estimate is None else step.estimate.seconds,
            "planned_seconds": step.planned_seconds,
            "advice": step.advice,
        }
        for step in proof.steps
    ]
    return found | {"compiler": proof.compiler, "fits": proof.fits, "steps": steps, "seconds": time.monotonic() - started}


def main(arguments: Sequence[str]) -> None:
    if arguments == ["--table"]:
        for name, mark in (("results_before.json", "before"), ("results.json", "compiled")):
            place(__file__, table(read(__file__, name)), mark)
        place(__file__, table_of_planner(read(__file__, "results_planner.json")), "planner")
        return
    of_planner = arguments == ["--planner"]
    found: dict[str, list[dict[str, Any]]] = {}
    for name in CHIPS:
        slices = sorted((s for s in slices_of(chips()[name]) if s.num_chips <= MOST), key=lambda s: s.num_chips)
        fits = [search(load_model_config("llama-3-70b"), slice_, WORKLOAD).best.fits for slice_ in slices]
        first = max(0, fits.index(True) - 1) if True in fits else len(slices) - 1
        found[name] = []
        for slice_ in slices[first:]:
            found[name].append(by_planner(slice_) if of_planner else tried(slice_))
            print(json.dumps(found[name][-1]), flush=True)
            if found[name][-1].get("fits"):
                break
    write(__file__, found, "results_planner.json" if of_planner else "results.json")
    place(__file__, table_of_planner(found) if of_planner else table(found), "planner" if of_planner else "compiled")


def table_of_planner(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| slice | layout | GiB per device | of usable | fits | step | cost model ms |", "|---|---|---|---|---|---|---|"]
    for row in (row for rows in found.values() for row in rows):
        gib = [f"{row[key] / 2**30:.2f}" for key in ("planner_bytes", "usable_bytes")]
        for step in row["steps"]:
            cells = (
                row["slice"],
                row["layout"],
                *gib,
                "yes" if row["fits"] else "no",
                step["step"],
                f"{1e3 * step['planned_seconds']:.1f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    heads = ("slice", "layout", "planner: GiB per device", "step", "compiler: GiB", "of usable", "fits", "estimate ms", "cost model ms")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in (row for rows in found.values() for row in rows):
        for step in row.get("steps", []):
            estimate = f"{1e3 * step['estimate_seconds']:.1f}" if step["estimate_seconds"] else ""
            planned = f"{1e3 * step['planned_seconds']:.1f}" if step["planned_seconds"] else ""
            gib = [f"{number / 2**30:.2f}" for number in (row["planner_bytes"], step["needed_bytes"], step["usable_bytes"])]
            cells = (row["slice"], row["layout"], gib[0], step["step"], *gib[1:], "yes" if step["fits"] else "no", estimate, planned)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
