"""Orca's evaluation in the simulator: GPT-3 175B on 2 stages of 8 A100-40GB, throughput against median normalised latency.

    python -m experiments.orca_175b_on_16_a100.measure        # ten minutes, writes results.json

Iteration-level scheduling (`orca`) at four batch sizes against request-level scheduling as FasterTransformer does it and with padded
prompts, at batch sizes 1, 8 and 16; prompts U(32, 512), answers U(1, 128), Poisson arrivals, no early end. The controls: homogeneous
lengths, and what an iteration costs the host.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from partinf.cost.calibration import calibration_for
from partinf.cost.pricing import Pricing
from partinf.engine import Engine
from partinf.engine.arrivals import parse_arrivals, parse_lengths
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.engine.simulation import Sizing, cost_runner, play
from partinf.hardware import parse_slice
from partinf.layout import make_layout
from partinf.model_config import load_model_config
from partinf.plans import Plan

REQUESTS = 400  # and a hundred seconds more of arrivals
MIXED, SAME = "uniform:32-512:1-128", "fixed:272:64"
TARGET = 0.190  # s per token, where the paper compares
PAPER = {"fastertransformer": 0.185, "orca": 6.81}
CURVES = [("orca", size) for size in (1, 8, 16, 32)]
CURVES += [(name, size) for name in ("fastertransformer", "request-level") for size in (1, 8, 16)]
RATES = [0.02 * 1.35**n for n in range(24)]


def simulate(scheduler: str, size: int, rate: float, lengths: str = MIXED, requests: int | None = None) -> dict[str, float]:
    """One point of a curve."""
    slice_ = parse_slice("a100-40:8")
    (axis,) = slice_.axis_sizes
    plan = Plan(load_model_config("gpt3-175b"), slice_, make_layout({axis: "ffn"}, {axis: "heads"}))
    pricing = Pricing(slice_, calibration_for(slice_.chip))
    sizing = Sizing(max_rows=2 * size, max_len=2048, prefill_tokens=512 * size, num_stages=2)
    runner, price = cost_runner(plan, pricing, sizing)
    policy = make_policy(scheduler, PolicyOptions(size), price.estimates(runner.limits, 2))
    engine = Engine(runner, policy=policy, clock=runner.clock)
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


def curve(scheduler: str, size: int, lengths: str, limit: float) -> list[dict[str, float]]:
    """Points at rising rates until the latency is far beyond the limit."""
    points: list[dict[str, float]] = []
    for rate in RATES:
        points.append(simulate(scheduler, size, rate, lengths))
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


def best(curves: dict[str, list[dict[str, float]]], scheduler: str, latency: float) -> tuple[float, str] | None:
    """The highest load at a latency over the batch sizes of a scheduler."""
    found = [
        (load, name) for name, points in curves.items() if name.startswith(scheduler) and (load := load_at(points, latency)) is not None
    ]
    return max(found, default=None)


def compare(curves: dict[str, list[dict[str, float]]], latency: float) -> dict[str, Any]:
    """Best loads at a latency, and how often the baselines' fits into Orca's."""
    loads = {name: best(curves, name, latency) for name in ("orca", "fastertransformer", "request-level")}
    orca = loads["orca"]
    result: dict[str, Any] = {"latency": latency, "loads": loads}
    for name in ("fastertransformer", "request-level"):
        other = loads[name]
        result[f"factor over {name}"] = orca[0] / other[0] if orca and other else None
    return result


def main() -> int:
    started = time.perf_counter()
    curves = {f"{name} {size}": curve(name, size, MIXED, 3.0) for name, size in CURVES}
    lowest = min(points[0]["latency"] for points in curves.values())
    same = {f"{name} {size}": curve(name, size, SAME, 0.5) for name, size in CURVES if size in (8, 16, 32)}
    results = {
        "requests": REQUESTS,
        "paper": PAPER,
        "curves": curves,
        "at_190_ms": compare(curves, TARGET),
        "at_twice_low_load": compare(curves, 2 * lowest),
        "homogeneous": {"lengths": SAME, "curves": same, "at_190_ms": compare(same, TARGET)},
        "low_load": {
            lengths: {name: simulate(name, 8, 0.05, lengths)["latency"] for name in ("orca", "fastertransformer", "request-level")}
            for lengths in (MIXED, SAME)
        },
        "low_load_rate": 0.05,
    }
    Path(__file__).with_name("results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: results[key] for key in ("at_190_ms", "at_twice_low_load", "low_load")}, indent=1))
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
