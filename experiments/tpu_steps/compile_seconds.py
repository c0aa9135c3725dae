"""What compiling a plan's steps takes, with layers one by one and in a loop, without a TPU.

    python -m experiments.tpu_steps.compile_seconds [NAME …]     # one to five minutes per step; writes compile_seconds.json
    python -m experiments.tpu_steps.compile_seconds --table      # the table of README.md from it; nothing is compiled

Seconds of a core, tracing included. `Platform.unrolled_layers` bounds the layers of all programs of a plan together up to which they are
compiled one by one.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from typing import Any

from experiments.results import machine, place, read, write
from experiments.tpu_steps.code import Case
from partinf.buckets import num_programs
from partinf.plans import Bucket, Plan
from partinf.proof.process import Limits, compile_bucket
from partinf.workload import DType, Workload

FILE = "compile_seconds.json"
_SECONDS = 1800.0
SERVED = Workload(batch=32, input_len=512, output_len=512)
CASES = {
    "Llama 3 8B, v5e:2x4, decode 32": Case("llama-3-8b", "v5e:2x4", "decode", 32, 2048),
    "Llama 3 8B, v5e:2x4, prompt of 512": Case("llama-3-8b", "v5e:2x4", "prefill", 1, 512),
    "Llama 3 70B int8, v5e:4x4, decode 32": Case("llama-3-70b", "v5e:4x4", "decode", 32, 2048, attention="batch", type=DType.INT8),
    "Llama 3 70B int8, v5e:4x4, prompt of 512": Case("llama-3-70b", "v5e:4x4", "prefill", 1, 512, type=DType.INT8),
}
LAYERS = {"llama-3-8b": 32, "llama-3-70b": 80}


def seconds_of(plan: Plan, bucket: Bucket) -> float:
    """Of a core, to compile one step."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    compile_bucket(plan, bucket, Limits(seconds=_SECONDS))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


def row_of(case: Case) -> dict[str, Any]:
    plan, bucket = case.step(LAYERS[case.model])
    programs = num_programs(SERVED)
    looped = replace(plan, buckets=(bucket,) * (plan.slice.chip.platform.unrolled_layers // plan.model.num_layers + 1))
    assert plan.unrolled
    assert not looped.unrolled
    one_by_one, loop = seconds_of(plan, bucket), seconds_of(looped, bucket)
    return {"one by one": one_by_one, "loop": loop, "programs of a plan": programs, "layers of all": programs * plan.model.num_layers}


def table(found: dict[str, Any]) -> str:
    lines = ["| step | one by one, s | loop, s | times |", "|---|---|---|---|"]
    for name in CASES:
        if name in found:
            single, loop = found[name]["one by one"], found[name]["loop"]
            lines.append(f"| {name} | {single} | {loop} | {single / loop:.1f} |")
    return "\n".join(lines)


def main(names: list[str]) -> None:
    found = read(__file__, FILE, missing={"machine": machine()})
    if names == ["--table"]:
        place(__file__, table(found), "compiling")
        return
    for name, case in CASES.items():
        if name not in names and (names or name in found):
            continue
        found[name] = row_of(case)
        print(name, found[name], flush=True)
        write(__file__, found, FILE)


if __name__ == "__main__":
    main(sys.argv[1:])
