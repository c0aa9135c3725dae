"""Proves the programs of the paper's tables 2 and 3 with the TPU compiler, and with them the layouts that the paper rejects.

    python -m experiments.palm_540b_on_64_v4.measure [NAME …]      # writes results.json; without names: what is missing there

One compilation at a time, each in its own process. Measured latencies are the paper's; nothing here is fitted to them.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from experiments.results import read, write
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.proof import CompilerFailed, Limits, Proof, proof_json, prove
from partinf.workload import DType

_PAGE, _CONTEXT = 16, 2048
_PROGRAMS = 6  # of an engine that serves: so many have their layers in a loop, and so does the one that is judged
_TWO_D = {"x": "embed", "y": "ffn", "z": "ffn"}
_ONE_D = dict.fromkeys("xyz", "ffn")
_BATCH = dict.fromkeys("xyz", "batch")
_HEADS = {"x": "none", "y": "heads", "z": "heads"}


@dataclass(frozen=True)
class Case:
    """One program; `measured` is the paper's time of the step, None for what the paper did not time."""

    name: str
    model: str
    slice: str
    phase: str
    batch: int
    weights: DType
    measured: float | None = None
    gather: str = ""
    one_d: bool = False
    heads: bool = False
    length: int = _CONTEXT
    ahead: bool = False  # weights are gathered ahead
    loop: str = ""  # axis of a looped collective, both ways around
    loop_gathers: bool = True
    by_compiler: bool = False  # the twin whose collectives the compiler chooses


CASES = (
    Case("540B low-latency decode", "palm-540b", "v4:4x4x4", "decode", 64, DType.INT8, 28.5e-3),
    Case("540B bf16 on 32 chips", "palm-540b", "v4:2x4x4", "decode", 64, DType.BF16),
    Case("540B bf16 decode at batch 64", "palm-540b", "v4:4x4x4", "decode", 64, DType.BF16, 36.9e-3),
    Case("540B high-throughput decode", "palm-540b", "v4:4x4x4", "decode", 512, DType.BF16, 6.0 / 64),
    Case("540B low-latency prefill", "palm-540b", "v4:4x4x4", "prefill", 1, DType.INT8, 0.29, heads=True),
    Case("62B low-latency decode", "palm-62b", "v4:2x2x4", "decode", 32, DType.INT8, 0.73 / 64),
    Case("62B high-throughput decode", "palm-62b", "v4:2x2x2", "decode", 512, DType.BF16, 5.1 / 64),
    Case("62B low-latency prefill", "palm-62b", "v4:2x2x4", "prefill", 1, DType.INT8, 0.16, heads=True),
    Case("540B high-throughput prefill", "palm-540b", "v4:4x4x4", "prefill", 512, DType.BF16, 85.2, gather="xyz"),
    Case("62B high-throughput prefill", "palm-62b", "v4:2x4x4", "prefill", 512, DType.BF16, 20.2, gather="xyz"),
    Case("540B prefill, one prompt per chip", "palm-540b", "v4:4x4x4", "prefill", 64, DType.BF16, gather="xyz"),
    Case("gathered ahead: one prompt per chip", "palm-540b", "v4:4x4x4", "prefill", 64, DType.BF16, gather="xyz", ahead=True),
    Case("gathered ahead: 540B high-throughput prefill", "palm-540b", "v4:4x4x4", "prefill", 512, DType.BF16, 85.2, "xyz", ahead=True),
    Case("gathered ahead: 62B high-throughput prefill", "palm-62b", "v4:2x4x4", "prefill", 512, DType.BF16, 20.2, "xyz", ahead=True),
    Case("rejected: decode over heads", "palm-540b", "v4:4x4x4", "decode", 64, DType.INT8, heads=True),
    Case("rejected: 1D at batch 512", "palm-540b", "v4:4x4x4", "decode", 512, DType.BF16, one_d=True),
    Case("looped over y: decode at batch 64", "palm-540b", "v4:4x4x4", "decode", 64, DType.INT8, 28.5e-3, loop="y"),
    Case("looped over y: decode at batch 512", "palm-540b", "v4:4x4x4", "decode", 512, DType.BF16, 6.0 / 64, loop="y"),
    Case(
        "scatters looped over y: 540B low-latency prefill",
        "palm-540b",
        "v4:4x4x4",
        "prefill",
        1,
        DType.INT8,
        0.29,
        heads=True,
        loop="y",
        loop_gathers=False,
    ),
    Case("compiler-partitioned: decode at batch 64", "palm-540b", "v4:4x4x4", "decode", 64, DType.INT8, 28.5e-3, by_compiler=True),
    Case("compiler-partitioned: decode at batch 512", "palm-540b", "v4:4x4x4", "decode", 512, DType.BF16, 6.0 / 64, by_compiler=True),
    Case(
        "compiler-partitioned: prefill, one prompt", "palm-540b", "v4:4x4x4", "prefill", 1, DType.INT8, 0.29, heads=True, by_compiler=True
    ),
    Case("rejected: weights gathered in decode", "palm-540b", "v4:4x4x4", "decode", 64, DType.INT8, gather="xyz"),
)


def plan_of(case: Case) -> tuple[Plan, Bucket]:
    """The paper's layout of a case, its cache for the whole batch, and the one step that is judged."""
    model, slice_ = load_model_config(case.model), parse_slice(case.slice)
    layout = _layout(case)
    padded = 64 if model.num_heads == 48 and slice_.num_chips == 64 else 0
    shards = 1 if case.heads and case.phase == "decode" else slice_.num_chips
    rows = -(-case.batch // slice_.num_chips) * slice_.num_chips
    cache = CacheConfig(_PAGE, rows // shards * case.length // _PAGE, rows)
    switch = 1 if case.phase == "prefill" else 1 << 30
    plan = Plan(model, slice_, layout, case.weights, max_len=case.length, cache=cache, prefill_from_tokens=switch, padded_heads=padded)
    bucket = Bucket(rows, case.length // _PAGE)
    if case.phase == "prefill":
        bucket = Bucket(prefill_tokens=case.batch * case.length, prefill_slots=case.batch)
    return replace(plan, buckets=(bucket,) * _PROGRAMS), bucket


def _layout(case: Case) -> Layout:
    storage = _ONE_D if case.one_d else _TWO_D
    decode = _HEADS if case.heads and case.phase == "decode" else _BATCH
    prefill = _HEADS if case.heads else _BATCH
    decode_gather = case.gather if case.phase == "decode" else ""
    loop = {"axis": case.loop, "gathers": case.loop_gathers} if case.loop else None
    gathers = {"decode_gather": decode_gather, "prefill_gather": case.gather, "prefill_ahead": case.ahead}
    return make_layout(storage, decode, prefill, **gathers, decode_loop=loop, prefill_loop=loop)


def run(case: Case) -> dict[str, Any]:
    """Prove one case."""
    plan, bucket = plan_of(case)
    start = time.monotonic()
    try:
        proof: Proof | None = prove(plan, [bucket], Limits(seconds=600, memory_bytes=8 << 30), by_compiler=case.by_compiler)
        proven: dict[str, Any] = proof_json(proof)["steps"][0] | {"compiler": proof.compiler}
    except (CompilerFailed, ValueError) as error:
        proven = {"failed": str(error)}
    return {"measured_seconds": case.measured, "wall_seconds": time.monotonic() - start, **proven}


def results() -> dict[str, Any]:
    """What was found so far."""
    found: dict[str, Any] = read(__file__, missing={})
    return found


def main(names: list[str]) -> None:
    """Run what was requested, or what has no result yet, and keep the results after every case."""
    known = results()
    for case in CASES:
        if case.name in names or (not names and case.name not in known):
            found = run(case)
            kept = results() | {case.name: found}
            write(__file__, {case.name: kept[case.name] for case in CASES if case.name in kept})
            print(case.name, found.get("fits"), found.get("step_seconds_estimate"), found.get("failed", ""), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
