"""Does the planner predict this machine once it is calibrated? Writes results.json.

    python -m experiments.calibrated_cpu.measure             # a quarter of an hour on two cores

Two processes, one after the other. With one CPU device: steps of two models that calibration does not use (decode at batch 1 to 64, prefill
of one and several prompts, float32 and bfloat16). With eight virtual devices: calibrate, let the planner rank all layouts of a model, and
time ten of them. Each process calibrates twice: before, and once more in turn with the steps, round by round. The second gives `predicted`,
which shares the machine's drift with what was measured; the first, what a user does, gives `predicted_before`.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 256
PROMPTS = ((64, 1), (512, 1), (512, 4))  # tokens in all, prompts
LAYOUTS, BATCH, INPUT, OUTPUT = 10, 16, 256, 64
BUDGET, CALIBRATION = 120.0, 30.0  # seconds of timing in turn, and of the calibration before


def models() -> list[Any]:
    """The two models of the predictions; the second is also the one that is split over eight devices."""
    from partinf.model_config import ModelConfig, load_model_config

    small = ModelConfig("llama-26m", 4, 512, 1536, 8, 4, 64, 16384, tied_embeddings=True, max_len=2048)
    return [load_model_config("llama-125m"), small]


def one_device() -> dict[str, Any]:
    """Predicted and measured steps of whole models on one device."""
    from partinf.layout import make_layout
    from partinf.measure.steps import Steps, for_buckets
    from partinf.plans import Bucket, Plan
    from partinf.sharding import local_slice
    from partinf.workload import DType

    types = (DType.F32, DType.BF16)
    before, first, _ = _calibrated(types, CALIBRATION, {})
    slice_ = local_slice(chip=before)
    layout = make_layout({"x": "replica"}, {"x": "batch"})
    buckets = tuple(Bucket(rows, CONTEXT // 16) for rows in BATCHES)
    buckets += tuple(Bucket(prefill_tokens=tokens, prefill_slots=prompts) for tokens, prompts in PROMPTS)
    plans, calls = {}, {}
    for dtype in types:
        for model in models():
            _say(f"compiling {model.name} in {dtype}")
            steps = Steps(for_buckets(Plan(model, slice_, layout, weights=dtype, kv=dtype), buckets))
            for bucket in buckets:
                name = f"{model.name}, {dtype}, {bucket}"
                plans[name], calls[name] = (steps.plan, bucket), steps.call(bucket)
    during, second, timings = _calibrated(types, BUDGET, calls)
    rows = []
    for name, (plan, bucket) in plans.items():
        predicted, in_turn = (_price(replace(plan, slice=replace(slice_, chip=chip)), bucket) for chip in (before, during))
        row = {"model": plan.model.name, "dtype": plan.weights.value, "step": str(bucket), "phase": _phase(bucket)}
        row |= {"tokens": bucket.num_tokens} | _measured(timings[name])
        rows.append(row | {"predicted": in_turn, "predicted_before": predicted})
    return {"steps": rows, "calibrations": [first, second]}


def eight_devices() -> dict[str, Any]:
    """Ten layouts of a small model over eight virtual devices: the planner's order and the measured one."""
    from partinf.cost.pricing import TILED
    from partinf.measure.steps import Steps, for_buckets
    from partinf.planner.choose import plan_of
    from partinf.planner.search import search
    from partinf.sharding import local_slice
    from partinf.workload import DType, Workload

    before, first, _ = _calibrated((DType.F32,), CALIBRATION, {})
    slice_, model = local_slice(chip=before), models()[1]
    workload = Workload(BATCH, INPUT, OUTPUT, weights=DType.F32, kv=DType.F32, prefill_batch=1)
    report = search(model, slice_, workload, program=TILED)
    calls, plans = {}, []
    for rank in _spread(report):
        plan = replace(plan_of(report, report.candidates[rank]), predicted=())
        buckets = _buckets(plan)
        _say(f"compiling layout {rank + 1} of {len(report.candidates)}: {report.candidates[rank].name}")
        steps = Steps(for_buckets(plan, buckets))
        plans.append((rank, steps.plan, buckets))
        calls |= {f"{rank} {phase}": steps.call(bucket) for phase, bucket in zip(("prefill", "decode"), buckets, strict=True)}
    during, second, timings = _calibrated((DType.F32,), BUDGET, calls)
    rows = []
    for rank, plan, buckets in plans:
        row: dict[str, Any] = {"rank": rank + 1, "layout": report.candidates[rank].name, "ffn": report.candidates[rank].asked.ffn}
        row |= {"attention": report.candidates[rank].asked.attention, "prefill_from_tokens": plan.prefill_from_tokens}
        for phase, bucket in zip(("prefill", "decode"), buckets, strict=True):
            row[phase] = {"step": str(bucket)} | _measured(timings[f"{rank} {phase}"])
            for name, chip in (("predicted", during), ("predicted_before", before)):
                row[phase][name] = _price(replace(plan, slice=replace(slice_, chip=chip)), bucket)
        for name in ("measured", "predicted", "predicted_before"):
            row[name] = row["prefill"][name] + OUTPUT * row["decode"][name]
        rows.append(row)
    found = {"model": model.name, "candidates": len(report.candidates), "layouts": rows}
    return found | {"workload": {"batch": BATCH, "input": INPUT, "output": OUTPUT}, "calibrations": [first, second]}


def _measured(timing: Any) -> dict[str, Any]:
    return {"measured": timing.seconds, "spread": timing.spread, "repeats": timing.repeats}


def _spread(report: Any) -> list[int]:
    """Ranks of ten candidates that run: the first, and the others evenly over the logarithm of the predicted time."""
    ranks = [rank for rank, candidate in enumerate(report.candidates) if candidate.fits and not candidate.padded_heads]
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
    pages = up(-(-(INPUT + OUTPUT // 2) // plan.cache.page_size), plan.num_parts)
    return prefill, Bucket(up(BATCH, plan.decode_row_multiple()), pages)


def _price(plan: Any, bucket: Any) -> float:
    from partinf.buckets import split_of
    from partinf.cost.calibration import calibration_for
    from partinf.cost.pricing import TILED, Pricing
    from partinf.cost.step import step_ledger

    return step_ledger(split_of(plan, bucket, Pricing(plan.slice, calibration_for(plan.slice.chip), program=TILED))).seconds


def _phase(bucket: Any) -> str:
    return "prefill" if bucket.prefill_tokens else "decode"


def _calibrated(types: tuple[Any, ...], budget: float, beside: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The chip as calibration finds it now; its rates, with the time that this took and the load of the machine then; and the timings of
    what was timed in the same rounds."""
    from partinf.measure.calibrate import calibrate

    started = time.perf_counter()
    chip, _, timings = calibrate(types, budget, _say, beside)
    spread = statistics.median(value for _, value in chip.rates.spread)
    found = {"seconds": time.perf_counter() - started, "load_average": os.getloadavg()[0], "median_spread": spread}
    return chip, found | {key: value for key, value in asdict(chip.rates).items() if key != "spread"}, timings


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The figures that the question asks for."""
    found: dict[str, Any] = {}
    for name in ("predicted", "predicted_before"):
        wrong = {}
        for row in results["one_device"]["steps"]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("one_device", "eight_devices"), help="one process's part, printed as JSON")
    args = parser.parse_args()
    if args.part:
        print(json.dumps(one_device() if args.part == "one_device" else eight_devices()))
        return
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "load_average_at_start": os.getloadavg()}
    for part, devices in (("one_device", "1"), ("eight_devices", "8")):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
        command = [sys.executable, "-m", "experiments.calibrated_cpu.measure", "--part", part]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[part] = json.loads(done.stdout)
    results["load_average_at_end"] = os.getloadavg()
    results["summary"] = summary(results)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["summary"], indent=1))


if __name__ == "__main__":
    main()
