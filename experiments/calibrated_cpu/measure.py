"""Does the planner predict this machine once it is calibrated? Writes results.json.

    python -m experiments.calibrated_cpu.measure             # about ten minutes on two cores
    python -m experiments.calibrated_cpu.measure --part bf16 # one of its three parts alone, next to what results.json has of the others

Three processes, one after the other. With one CPU device, one process in float32 and one in bfloat16: steps of two models that calibration
does not use (decode at batch 1 to 64, prefill of one and several prompts). With eight virtual devices: calibrate, let the planner rank all
layouts of a model, and time ten of them. Each process calibrates twice: before, and once more in turn with the steps, round by round. The
second gives `predicted`, which shares the machine's drift with what was measured; the first, what a user does, gives `predicted_before`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import Any

from experiments.results import read, write

PARTS = {"f32": "1", "bf16": "1", "eight_devices": "8"}  # and how many devices each has
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 256
PROMPTS = ((64, 1), (512, 1), (512, 4))  # tokens in all, prompts
LAYOUTS, BATCH, INPUT, OUTPUT = 10, 16, 256, 64
BUDGET, CALIBRATION = 60.0, 30.0  # seconds of timing in turn, and of the calibration before


def models() -> list[Any]:
    """The two models of the predictions; the second is also the one that is split over eight devices."""
    from partinf.model.config import ModelConfig
    from partinf.model.load import load_model_config

    small = ModelConfig("llama-26m", 4, 512, 1536, 8, 4, 64, 16384, tied_embeddings=True, max_len=2048)
    return [load_model_config("llama-125m"), small]


def plans_of(dtype: Any) -> dict[str, tuple[Any, Any]]:
    """The steps of the models on one device, by name: plan and bucket."""
    from partinf.layout.files import make_layout
    from partinf.measure.steps import for_buckets
    from partinf.partition.sharding import local_slice
    from partinf.plans import Bucket, Plan

    layout = make_layout({"x": "replica"}, {"x": "batch"})
    buckets = tuple(Bucket(rows, CONTEXT // 16) for rows in BATCHES)
    buckets += tuple(Bucket(prefill_tokens=tokens, prefill_slots=prompts) for tokens, prompts in PROMPTS)
    plans = [for_buckets(Plan(model, local_slice(), layout, weights=dtype, kv=dtype), buckets) for model in models()]
    return {f"{plan.model.name}, {bucket}": (plan, bucket) for plan in plans for bucket in buckets}


def one_device(dtype: Any) -> dict[str, Any]:
    """Times of a calibration, and of another in turn with steps of whole models on one device."""
    from partinf.measure.calibrate import Measured
    from partinf.measure.steps import Steps

    calls = Measured((dtype,)).calls(_say)
    _say("calibrating before")
    before = _timed(calls, CALIBRATION)
    steps: dict[str, Any] = {}
    for name, (plan, bucket) in plans_of(dtype).items():
        if plan.model.name not in steps:
            _say(f"compiling {plan.model.name} in {dtype}")
            steps[plan.model.name] = Steps(plan)
        calls[name] = steps[plan.model.name].call(bucket)
    _say("calibrating in turn")
    return {"timings_before": before, "timings": _timed(calls, BUDGET)}


def predict(part: str, found: dict[str, Any]) -> dict[str, Any]:
    """What the times of `one_device` say: rates, and the steps as they are predicted and measured."""
    from partinf.measure.calibrate import Measured
    from partinf.measure.timing import Timing
    from partinf.partition.sharding import local_slice
    from partinf.workload import DType

    dtype, chips = DType(part), []
    for key in ("timings_before", "timings"):
        chips.append(Measured((dtype,)).chip({name: Timing(*timing) for name, timing in found[key].items()})[0])
    rows = []
    for name, (plan, bucket) in plans_of(dtype).items():
        seconds, spread, repeats = found["timings"][name]
        before, in_turn = (_price(replace(plan, slice=local_slice(chip=chip)), bucket) for chip in chips)
        row = {"model": plan.model.name, "dtype": part, "step": str(bucket), "phase": _phase(bucket), "tokens": bucket.num_tokens}
        row |= {"measured": seconds, "spread": spread, "repeats": repeats, "predicted": in_turn, "predicted_before": before}
        rows.append(row)
    return found | {"steps": rows, "calibrations": [_rates(chip) for chip in chips]}


def eight_devices() -> dict[str, Any]:
    """Ten layouts of a small model over eight virtual devices: the planner's order and the measured one."""
    from partinf.cost.program import TILED
    from partinf.measure.calibrate import Measured
    from partinf.measure.steps import Steps, for_buckets
    from partinf.measure.timing import alternate
    from partinf.partition.sharding import local_slice
    from partinf.planner.report import search
    from partinf.workload import DType, Workload

    measured = Measured((DType.F32,))
    calls = measured.calls(_say)
    _say("calibrating before")
    before, _ = measured.chip(alternate(calls, CALIBRATION))
    slice_, model = local_slice(chip=before), models()[1]
    workload = Workload(BATCH, INPUT, OUTPUT, weights=DType.F32, kv=DType.F32, prefill_batch=1)
    report = search(model, slice_, workload, program=TILED)
    plans = []
    for rank in _spread(report):
        plan = replace(report.plan_of(report.candidates[rank]), predicted=())
        buckets = _buckets(plan)
        _say(f"compiling layout {rank + 1} of {len(report.candidates)}: {report.candidates[rank].name}")
        steps = Steps(for_buckets(plan, buckets))
        plans.append((rank, steps.plan, buckets))
        calls |= {f"{rank} {phase}": steps.call(bucket) for phase, bucket in zip(("prefill", "decode"), buckets, strict=True)}
    _say("calibrating in turn")
    timings = alternate(calls, BUDGET)
    during, _ = measured.chip(timings)
    rows = []
    for rank, plan, buckets in plans:
        row: dict[str, Any] = {"rank": rank + 1, "layout": report.candidates[rank].name, "ffn": report.candidates[rank].main.ffn}
        row |= {"attention": report.candidates[rank].main.attention, "prefill_from_tokens": plan.prefill_from_tokens}
        for phase, bucket in zip(("prefill", "decode"), buckets, strict=True):
            row[phase] = {"step": str(bucket)} | _measured(timings[f"{rank} {phase}"])
            for name, chip in (("predicted", during), ("predicted_before", before)):
                row[phase][name] = _price(replace(plan, slice=replace(slice_, chip=chip)), bucket)
        for name in ("measured", "predicted", "predicted_before"):
            row[name] = row["prefill"][name] + OUTPUT * row["decode"][name]
        rows.append(row)
    found = {"model": model.name, "candidates": len(report.candidates), "layouts": rows}
    return found | {"workload": {"batch": BATCH, "input": INPUT, "output": OUTPUT}, "calibrations": [_rates(before), _rates(during)]}


def _timed(calls: dict[str, Any], budget: float) -> dict[str, list[float]]:
    from partinf.measure.timing import alternate

    return {name: [timing.seconds, timing.spread, timing.repeats] for name, timing in alternate(calls, budget).items()}


def _rates(chip: Any) -> dict[str, Any]:
    found = asdict(chip.rates)
    return found | {"spread": statistics.median(value for _, value in found["spread"])}


def _measured(timing: Any) -> dict[str, Any]:
    return {"measured": timing.seconds, "spread": timing.spread, "repeats": timing.repeats}


def _spread(report: Any) -> list[int]:
    """Ranks of ten candidates that run: the first, and the others evenly over the logarithm of the predicted time.

    Without stages, whose decode step is as many ticks of smaller batches as there are stages.
    """
    from partinf.layout import Role

    runs = lambda candidate: candidate.fits and not candidate.padded_heads and not candidate.layout.storage_axes(Role.STAGE)  # noqa: E731
    ranks = [rank for rank, candidate in enumerate(report.candidates) if runs(candidate)]
    scores = {rank: math.log(report.candidates[rank].score) for rank in ranks}
    low, high = scores[ranks[0]], scores[ranks[-1]]
    chosen = [ranks[0]]
    for number in range(1, LAYOUTS):
        wanted = low + (high - low) * number / (LAYOUTS - 1)
        chosen.append(min((rank for rank in ranks if rank not in chosen), key=lambda rank: abs(scores[rank] - wanted)))
    return sorted(chosen)


def _buckets(plan: Any) -> tuple[Any, Any]:
    """The workload's prefill and decode steps, padded to what the layout divides."""
    from partinf.plans import Bucket

    up = lambda size, multiple: -(-size // multiple) * multiple  # noqa: E731
    slots = up(1, plan.prefill_slot_multiple())
    prefill = Bucket(prefill_tokens=up(slots * INPUT, plan.prefill_token_multiple()), prefill_slots=slots)
    pages = up(-(-(INPUT + OUTPUT // 2) // plan.cache.page_size), plan.num_sequence_shards)
    return prefill, Bucket(up(BATCH, plan.decode_row_multiple()), pages)


def _price(plan: Any, bucket: Any) -> float:
    from partinf.buckets import split_of
    from partinf.cost.calibration import calibration_for
    from partinf.cost.pricing import Pricing
    from partinf.cost.program import TILED
    from partinf.cost.step import step_ledger

    return step_ledger(split_of(plan, bucket, Pricing(plan.slice, calibration_for(plan.slice.chip), program=TILED))).seconds


def _phase(bucket: Any) -> str:
    return "prefill" if bucket.prefill_tokens else "decode"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The figures that the question asks for."""
    found: dict[str, Any] = {}
    for name in ("predicted", "predicted_before"):
        wrong: dict[str, list[float]] = {}
        for row in [row for part in ("f32", "bf16") for row in results[part]["steps"]]:
            for key in ("all", row["dtype"], row["phase"], row["model"]):
                wrong.setdefault(key, []).append(abs(row[name] / row["measured"] - 1))
        found[f"median_error_{name}"] = {key: statistics.median(errors) for key, errors in wrong.items()}
        found[f"worst_error_{name}"] = max(wrong["all"])
    layouts = results["eight_devices"]["layouts"]
    best = min(row["measured"] for row in layouts)
    for name in ("predicted", "predicted_before"):
        choice = min(layouts, key=lambda row: row[name])
        found[f"choice_{name}"] = {"layout": choice["layout"], "ffn": choice["ffn"], "attention": choice["attention"]}
        found[f"choice_{name}"] |= {"measured": choice["measured"], "over_best": choice["measured"] / best - 1}
        found[f"median_error_of_layouts_{name}"] = statistics.median(abs(row[name] / row["measured"] - 1) for row in layouts)
    return found


def _measure(part: str) -> dict[str, Any]:
    """One part, in this process."""
    from partinf.workload import DType

    loads = [os.getloadavg()[0]]
    found = eight_devices() if part == "eight_devices" else predict(part, one_device(DType(part)))
    return {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "load_average": [*loads, os.getloadavg()[0]]} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=tuple(PARTS), help="measure this part alone")
    parser.add_argument("--again", action="store_true", help="predict again from the times in results.json; eight_devices stays as it is")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(_measure(args.part)))
        return
    if args.again:
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        results = read(__file__)
        results |= {part: predict(part, results[part]) for part in ("f32", "bf16")}
        _write(results)
        return
    results = read(__file__) if args.part else {}
    for part in (args.part,) if args.part else PARTS:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": PARTS[part]}
        command = [sys.executable, "-m", "experiments.calibrated_cpu.measure", "--here", "--part", part]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[part] = json.loads(done.stdout)
        _write(results)


def _write(results: dict[str, Any]) -> None:
    if set(PARTS) <= set(results):
        results["summary"] = summary(results)
    write(__file__, results)
    print(json.dumps(results.get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
