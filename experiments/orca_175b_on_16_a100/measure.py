"""Orca's evaluation in the simulator: GPT-3 175B on 2 stages of 8 A100-40GB, and 341B on 4 of 8, throughput against median normalised
latency, and how much of the stages' time is bubbles.

    python -m experiments.orca_175b_on_16_a100.measure            # a quarter of an hour on one idle core, writes results.json
    python -m experiments.orca_175b_on_16_a100.measure bubbles    # that part anew

Iteration-level scheduling (`orca`) at four batch sizes against request-level scheduling as FasterTransformer does it and with padded
prompts, at batch sizes 1, 8 and 16; prompts U(32, 512), answers U(1, 128), Poisson arrivals, no early end. The controls: homogeneous
lengths, and low load.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from partinf.buckets import Capacity, with_capacity
from partinf.cost.calibration import calibration_for
from partinf.cost.pricing import Pricing
from partinf.cost.program import LOOPED, TILED, Program
from partinf.engine import Engine
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.engine.step import Step
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Plan
from partinf.simulation.arrivals import parse_arrivals, parse_lengths
from partinf.simulation.cost_runner import CostRunner
from partinf.simulation.play import play
from partinf.simulation.schedule_trace import ScheduleTrace
from partinf.simulation.sizing import Sizing, cost_runner
from partinf.simulation.step_price import Price, StepPrice

REQUESTS = 400  # and a hundred seconds more of arrivals
MIXED, SAME, LONGEST = "uniform:32-512:1-128", "fixed:272:64", 640
TARGET = 0.190  # s per token, where the paper compares
PAPER = {"fastertransformer": 0.185, "orca": 6.81}
SCHEDULERS = ("orca", "fastertransformer", "request-level")
CURVES = [("orca", size) for size in (1, 8, 16, 32)]
CURVES += [(name, size) for name in ("fastertransformer", "request-level") for size in (1, 8, 16)]
RATES = [0.02 * 1.35**n for n in range(24)]
SLICES = {"gpt3-175b": "a100-40:8*2", "gpt3-341b": "a100-40:8*4"}  # inter-layer × intra-layer, as in the paper
FULL = 40.0  # requests per second: more than any setup carries
# Prompt tokens of a step. A request brings 272 and is decoded 64 times, so a batch of 32 sees 136 of them per iteration: with 128, every
# step has as many of both as it can take.
WHOLE_PROMPTS, EVEN_SHARE = 0, 128


LOW = 0.05


class Padding(StrEnum):
    """What a tick pads beyond the longest of its steps: nothing; decode rows and prompt tokens to those of a bucket, where lanes read
    their own pages (the TPU's kernel); pages too, where every lane reads all pages of the bucket (attention tile by tile at its worst)."""

    NONE = "none"
    ROWS = "rows and tokens"
    PAGES = "rows, tokens and pages"


Curves = dict[str, list[dict[str, float]]]
"""Points by scheduler and batch size."""


def simulate(
    scheduler: str,
    size: int,
    rate: float,
    lengths: str = MIXED,
    requests: int | None = None,
    model: str = "gpt3-175b",
    prefill_tokens: int = WHOLE_PROMPTS,
    trace: ScheduleTrace | None = None,
    padding: Padding = Padding.NONE,
    program: Program = LOOPED,
) -> dict[str, float]:
    """One point of a curve."""
    slice_ = parse_slice(SLICES[model])
    layout = make_layout({"dcn": "stage", "x": "ffn"}, {"dcn": "none", "x": "heads"})
    plan = Plan(load_model_config(model), slice_, layout)
    pricing = Pricing(slice_, calibration_for(slice_.chip), program=program)
    sizing = Sizing(max_rows=size, max_len=2048, prefill_tokens=prefill_tokens or 512 * size)
    runner, price = cost_runner(plan, pricing, sizing)
    if padding is not Padding.NONE:
        runner = CostRunner(runner.limits, padded_ticks(plan, pricing, price, sizing, padding))
    policy = make_policy(scheduler, PolicyOptions(size), price.estimates(runner.limits))
    engine = Engine(runner, policy=policy, clock=runner.clock, on_step=None if trace is None else trace.on_step)
    arrivals = parse_arrivals(f"poisson:{rate}", parse_lengths(lengths), requests or REQUESTS + int(100 * rate), seed=0)
    started = time.perf_counter()
    play(engine, arrivals, runner.clock, next_finish=lambda: runner.next_finish)
    wall = time.perf_counter() - started
    summary = engine.metrics.summary()
    return {
        "rate": rate,
        "throughput": summary.num_finished / (runner.clock.now - arrivals[0].time),
        "latency": summary.normalized_latency.p50,
        "mean_latency": summary.normalized_latency.mean,
        "batch": summary.mean_batch_size,
        "iterations": summary.iterations,
        "step_seconds": engine.metrics.step_seconds / summary.iterations,
        "wall_per_iteration": wall / summary.iterations,
        "kv_tokens": runner.limits.pages_per_shard * runner.limits.page_size,
    }


def padded_ticks(plan: Plan, pricing: Pricing, own: StepPrice, sizing: Sizing, padding: Padding) -> Callable[..., Price]:
    """Prices ticks at the buckets that the JAX runner would compile for contexts of up to 640 tokens, and what a stage does for a step of
    its own, which is priced alone, at the step's own shape."""
    capacity = Capacity(sizing.max_rows * plan.num_stages, LONGEST, sizing.prefill_tokens)
    buckets = StepPrice(plan, pricing, buckets=with_capacity(plan, capacity).buckets)

    def price(*steps: Step) -> Price:
        shape = own.shape(*steps)
        if len(steps) == 1 or not shape.num_tokens:
            return own(*steps)
        padded = buckets.shape(*steps)
        if padding is Padding.ROWS and shape.decode_rows:
            context = shape.decode_rows * shape.decode_context // padded.decode_rows
            padded = replace(padded, decode_context=context, prefill_slots=shape.prefill_slots, prefill_context=shape.prefill_context)
        return Price(own.seconds(padded), padded.num_tokens)

    return price


def bubbles(scheduler: str, prefill_tokens: int, model: str, padding: Padding = Padding.NONE, requests: int = 600) -> dict[str, float]:
    """The share of the stages' time, in the middle half of a run with more requests than it can take, in which they did not work on a
    step of their own: empty, in a tick that is as long as another stage's step, or on padding. Read from the schedule trace."""
    trace = ScheduleTrace()
    how: dict[str, Any] = {"model": model, "prefill_tokens": prefill_tokens, "trace": trace, "padding": padding}
    point = simulate(scheduler, 32, FULL, requests=requests, **how)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        trace.write(path)
        events = json.loads(path.read_text())["traceEvents"]
    (lanes,) = (event["pid"] for event in events if event["ph"] == "M" and event["args"]["name"] == "stages")
    work = [event for event in events if event["ph"] == "X" and event["pid"] == lanes]
    end = max(event["ts"] + event["dur"] for event in work)
    low, high = 0.25 * end, 0.75 * end
    busy = sum(max(0.0, min(event["ts"] + event["dur"], high) - max(event["ts"], low)) for event in work)
    stages = len({event["tid"] for event in work})
    return {"bubbles": 1 - busy / (stages * (high - low)), "stages": stages, "throughput": point["throughput"], "batch": point["batch"]}


def all_bubbles() -> dict[str, dict[str, dict[str, float]]]:
    """Of both models: Orca's whole prompts, prompts cut to an even share for every step, also with the padding of buckets, and
    request-level scheduling's one batch."""
    ways = {"orca": WHOLE_PROMPTS, "fcfs-chunked": EVEN_SHARE, "request-level": WHOLE_PROMPTS}
    found = {model: {name: bubbles(name, tokens, model) for name, tokens in ways.items()} for model in SLICES}
    for model, more in found.items():
        more |= {f"fcfs-chunked, {how}": bubbles("fcfs-chunked", EVEN_SHARE, model, how) for how in (Padding.ROWS, Padding.PAGES)}
    return found


def curve(scheduler: str, size: int, lengths: str, limit: float, model: str = "gpt3-175b") -> list[dict[str, float]]:
    """Points at rising rates until the latency is far beyond the limit."""
    points: list[dict[str, float]] = []
    for rate in RATES:
        points.append(simulate(scheduler, size, rate, lengths, model=model))
        print(f"{scheduler} {size} {rate:.3f} {points[-1]['throughput']:.3f}/s {points[-1]['latency'] * 1e3:.0f} ms", file=sys.stderr)
        if points[-1]["latency"] > limit:
            break
    return points


def load_at(points: list[dict[str, float]], latency: float) -> float | None:
    """Throughput at a latency, linear between points of a curve; None when even the first point is slower."""
    if points[0]["latency"] > latency:
        return None
    for before, after in itertools.pairwise(points):
        if after["latency"] >= latency:
            share = (latency - before["latency"]) / (after["latency"] - before["latency"])
            return before["throughput"] + share * (after["throughput"] - before["throughput"])
    return points[-1]["throughput"]


def best(found: Curves, scheduler: str, latency: float) -> tuple[float, str] | None:
    """The highest load at a latency over the batch sizes of a scheduler."""
    mine = [(load_at(points, latency), name) for name, points in found.items() if name.startswith(scheduler)]
    return max(((load, name) for load, name in mine if load is not None), default=None)


def compare(found: Curves, latency: float) -> dict[str, Any]:
    """Loads at a latency, the best of each scheduler, and how often the baselines' fits into Orca's."""
    loads = {name: best(found, name, latency) for name in SCHEDULERS}
    orca = loads["orca"]
    each = {name: load_at(points, latency) for name, points in found.items()}
    result: dict[str, Any] = {"latency": latency, "loads": loads, "each": each}
    for name in ("fastertransformer", "request-level"):
        other = loads[name]
        result[f"factor over {name}"] = orca[0] / other[0] if orca and other else None
    return result


def curves(scheduler: str, lengths: str, limit: float, sizes: tuple[int, ...], model: str = "gpt3-175b") -> Curves:
    """The curves of a scheduler, by scheduler and batch size."""
    return {f"{name} {size}": curve(name, size, lengths, limit, model) for name, size in CURVES if name == scheduler and size in sizes}


def low_load() -> dict[str, dict[str, float]]:
    """Median latencies at a load at which no request waits."""
    return {lengths: {name: simulate(name, 8, LOW, lengths)["latency"] for name in SCHEDULERS} for lengths in (MIXED, SAME)}


def near_target(program: Program = LOOPED) -> dict[str, dict[str, Any]]:
    """Both models around 190 ms per token: a few loads of the best batch sizes, without the whole curves, and the load at the target."""
    cases = {
        "gpt3-175b": {("orca", 32): (9.0, 11.0, 13.0), ("fastertransformer", 1): (0.25, 0.3, 0.35), ("request-level", 16): (1.5, 1.9, 2.3)},
        "gpt3-341b": {("orca", 32): (7.0, 9.0, 11.0), ("fastertransformer", 1): (0.1, 0.15, 0.2), ("request-level", 16): (0.6, 0.9, 1.2)},
    }
    found: dict[str, dict[str, Any]] = {}
    for model, ways in cases.items():
        points = {
            f"{name} {size}": [simulate(name, size, rate, model=model, program=program) for rate in rates]
            for (name, size), rates in ways.items()
        }
        found[model] = {"points": points, "compared": compare(points, TARGET)}
    return found


PARTS: dict[str, Callable[[], Any]] = {
    "near 190 ms": near_target,
    "near 190 ms, tiled": partial(near_target, TILED),
    **{f"175b {name}": partial(curves, name, MIXED, 3.0, (1, 8, 16, 32)) for name in SCHEDULERS},
    **{f"same {name}": partial(curves, name, SAME, 0.5, (8, 16, 32)) for name in SCHEDULERS},
    **{f"341b {name}": partial(curves, name, MIXED, 1.0, (1, 8, 16, 32), "gpt3-341b") for name in SCHEDULERS},
    "low load": low_load,
    "bubbles": all_bubbles,
}


def whole_curves(parts: dict[str, Any], title: str) -> Curves:
    """The curves of a title, with the points that were measured near the target."""
    found: Curves = {key: list(points) for name in SCHEDULERS for key, points in parts.get(f"{title} {name}", {}).items()}
    near = parts.get("near 190 ms", {}).get(f"gpt3-{title}", {"points": {}})["points"]
    for key, points in near.items():
        if key in found:
            found[key] = sorted(found[key] + points, key=lambda point: point["rate"])
    return found


def compared(parts: dict[str, Any]) -> dict[str, Any]:
    """All that the parts say together, as far as they have been measured."""
    results: dict[str, Any] = {"requests": REQUESTS, "paper": PAPER, "parts": parts}
    for title in ("175b", "same", "341b"):
        if all(f"{title} {name}" in parts for name in SCHEDULERS):
            found = whole_curves(parts, title)
            lowest = min(points[0]["latency"] for points in found.values())
            results |= {f"{title} at 190 ms": compare(found, TARGET), f"{title} at twice low load": compare(found, 2 * lowest)}
    return results


def main(arguments: list[str]) -> int:
    """Measure the parts that are named, or all, and compare what the file has."""
    path = Path(__file__).with_name("results.json")
    for name in arguments or PARTS:
        started = time.perf_counter()
        found = PARTS[name]()
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        parts = json.loads(path.read_text())["parts"] if path.exists() else {}
        path.write_text(json.dumps(compared(parts | {name: found}), indent=1) + "\n")
    results = json.loads(path.read_text())
    bubbled = {"bubbles": results["parts"].get("bubbles")}
    print(json.dumps({key: value for key, value in results.items() if key != "parts"} | bubbled, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
