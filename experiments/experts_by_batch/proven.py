"""Steps of mixtures of experts compiled whole for their slices, without a TPU, and compared with their plans.

    python -m experiments.experts_by_batch.proven TEXTS [NAME …]     # a minute of one core each; writes proven.json

TEXTS: a folder that keeps what the compiler printed; programs in it are not compiled again. Without names the folder is read.
"""

from __future__ import annotations

import gzip
import json
import resource
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.results import write
from partinf.buckets import serving_steps
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner.question import Question
from partinf.planner.report import answer
from partinf.plans import Bucket, Plan
from partinf.proof.process import Compiled, Limits, compile_bucket
from partinf.proof.proving import planned_ledger, schedule_of
from partinf.workload import Workload


class Case(NamedTuple):
    """A step; `mesh` is None for the slice's own."""

    model: str
    slice: str
    mesh: str | None
    workload: Workload


CASES = {
    "qwen-3-30b-a3b on v6e:2x2, 32 × 4608": Case("qwen-3-30b-a3b", "v6e:2x2", None, Workload(batch=32, context_len=4608, phase="decode")),
    "qwen-3-30b-a3b on v6e:2x2, 96 × 4608": Case("qwen-3-30b-a3b", "v6e:2x2", None, Workload(batch=96, context_len=4608, phase="decode")),
    "qwen-3-30b-a3b on v6e:2x2, prefill 8 × 4096": Case(
        "qwen-3-30b-a3b", "v6e:2x2", None, Workload(batch=8, input_len=4096, phase="prefill")
    ),
    "gpt-oss-120b on v6e:2x4, 64 × 4096": Case("gpt-oss-120b", "v6e:2x4", None, Workload(batch=64, context_len=4096, phase="decode")),
    "qwen-3-235b-a22b on v6e:4x4, 32 × 4096": Case(
        "qwen-3-235b-a22b", "v6e:4x4", None, Workload(batch=32, context_len=4096, phase="decode")
    ),
    "qwen-3-235b-a22b on v5e:8x8, 64 × 4096": Case(
        "qwen-3-235b-a22b", "v5e:8x8", None, Workload(batch=64, context_len=4096, phase="decode")
    ),
}


def planned(case: Case) -> tuple[Plan, Bucket, str]:
    """The planner's choice, its step, and its name."""
    model, workload = load_model_config(case.model), case.workload
    report = answer(Question(model, workload), parse_slice(case.slice, case.mesh))
    best = report.best
    plan = Plan(model, report.slice, best.layout, workload.weights, workload.kv, padded_heads=best.padded_heads)
    plan, (bucket,) = serving_steps(plan, workload)
    return replace(plan, buckets=(bucket,)), bucket, best.name


def file_of(name: str, texts: Path) -> Path:
    return texts / f"{name.replace(' ', '_').replace(':', '_')}.json.gz"


def row(name: str, texts: Path) -> dict[str, Any]:
    plan, bucket, layout = planned(CASES[name])
    kept = json.loads(gzip.decompress(file_of(name, texts).read_bytes()))
    if kept["layout"] != layout:
        raise SystemExit(f"{name}: {file_of(name, texts)} is a program of {kept['layout']}, and {layout} is planned today: delete it")
    compiled = Compiled(**kept["compiled"])
    schedule, kinds = schedule_of(plan, bucket, compiled.program), compiled.memory
    needed = kinds["argument"] + kinds["temp"] + kinds["generated_code"] + max(0, kinds["output"] - kinds["alias"])
    moved = sum(work.seconds * work.count for work in schedule.work if work.moves)
    return {
        "layout": layout.split(", prefill")[0],
        "planned_ms": round(1e3 * planned_ledger(plan, bucket).seconds, 2),
        "proven_ms": round(1e3 * schedule.seconds, 2),
        "copies_ms": round(1e3 * moved, 2),
        "compiled_gb": round(needed / 1e9, 2),
        "cpu_seconds": kept["cpu_seconds"],
        "peak_gb": kept["peak_gb"],
    }


def _cpu_seconds() -> float:
    """Of the compilers that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _peak_bytes() -> int:
    """Of the largest of them; compile one at a time to know whose."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10


def main(texts: Path, names: list[str]) -> None:
    texts.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not file_of(name, texts).is_file():
            plan, bucket, layout = planned(CASES[name])
            before = _cpu_seconds()
            compiled = compile_bucket(plan, bucket, Limits(seconds=3600))
            needed = {"cpu_seconds": round(_cpu_seconds() - before, 1), "peak_gb": round(_peak_bytes() / 1e9, 2)}
            file_of(name, texts).write_bytes(gzip.compress(json.dumps({"layout": layout, "compiled": asdict(compiled), **needed}).encode()))
    found = {name: row(name, texts) for name in CASES if file_of(name, texts).is_file()}
    write(__file__, found, "proven.json")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
