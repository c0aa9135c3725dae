"""FastServe's evaluation in the simulator: chat lengths, batch 16, OPT models on A100-40GB, five schedulers over load.

    python -m experiments.fastserve_opt_on_a100.measure        # twenty minutes on two cores, writes results.json

Mean, P95 and P99 of completion time and of latency per generated token, over Poisson load; the load that each scheduler carries at a
mean of 0.3 s per token; and for the multi-level feedback queue the three ways to make room, and α of 0.3 and 30 s.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partinf.cost.calibration import calibration_for
from partinf.cost.pricing import Pricing
from partinf.engine import Engine
from partinf.engine.arrivals import chat_lengths, parse_arrivals
from partinf.engine.policies.ranked import Eviction
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.engine.simulation import Sizing, cost_runner, play
from partinf.hardware import DCN_AXIS, parse_slice
from partinf.layout import make_layout
from partinf.model_config import load_model_config
from partinf.plans import Plan

REQUESTS, BATCH, TARGET = 400, 16, 0.3
HOST_BYTES = 128e9  # per GPU, for swapped pages
SCHEDULERS = ("orca", "fcfs", "mlfq", "mlfq-naive", "srpt")
WAYS = tuple(itertools.product((0.3, 30.0), ("proactive", "reactive", "recompute")))


@dataclass(frozen=True)
class Setup:
    """A model on its GPUs, and the loads at which it is looked at (shares of `capacity`, requests per second that a full batch decodes)."""

    model: str
    slice: str
    capacity: float


SETUPS = (Setup("opt-13b", "a100-40:1", 1.5), Setup("opt-66b", "a100-40:8", 1.7), Setup("opt-175b", "a100-40:8*2", 1.4))
SHARES = (0.6, 0.9, 1.1, 1.3, 1.6, 2.0, 2.5)


def simulate(setup: Setup, scheduler: str, rate: float, eviction: str = "proactive", alpha: float = 0.3) -> dict[str, Any]:
    """One scheduler at one load."""
    slice_ = parse_slice(setup.slice)
    axes = list(slice_.axis_sizes)
    within = [axis for axis in axes if axis != DCN_AXIS]
    storage, attention = dict.fromkeys(axes, "stage") | dict.fromkeys(within, "ffn"), dict.fromkeys(axes, "none")
    plan = Plan(load_model_config(setup.model), slice_, make_layout(storage, attention | dict.fromkeys(within, "heads")))
    pricing = Pricing(slice_, calibration_for(slice_.chip))
    residents = 16 * BATCH
    sizing = Sizing(BATCH, residents, 2048, 4096, host_bytes=HOST_BYTES)
    runner, price = cost_runner(plan, pricing, sizing)
    policy = make_policy(scheduler, PolicyOptions(BATCH, alpha, Eviction(eviction)), price.estimates(runner.limits))
    engine = Engine(runner, policy=policy, clock=runner.clock)
    arrivals = parse_arrivals(f"poisson:{rate}", chat_lengths, REQUESTS, seed=0)
    play(engine, arrivals, runner.clock, next_finish=lambda: runner.next_finish)
    summary = engine.metrics.summary()

    def three(values: Any) -> list[float]:
        return [values.mean, values.p95, values.p99]

    return {
        "model": setup.model,
        "scheduler": scheduler,
        "eviction": eviction,
        "alpha": alpha,
        "rate": rate,
        "throughput": summary.num_finished / (runner.clock.now - arrivals[0].time),
        "per_token": three(summary.normalized_latency),
        "completion": three(summary.completion_time),
        "ttft": three(summary.ttft),
        "time_per_token": three(summary.time_per_token),
        "swap_outs": summary.swap_outs,
        "preemptions": summary.preemptions,
        "batch": summary.mean_batch_size,
        "kv_tokens": runner.limits.pages_per_shard * runner.limits.page_size,
    }


def load_at(points: list[dict[str, Any]], latency: float) -> float | None:
    """Load at a mean latency per token, linear between the points of a curve; None when it is beyond the last."""
    for before, after in itertools.pairwise(points):
        low, high = before["per_token"][0], after["per_token"][0]
        if low <= latency < high:
            return before["rate"] + (latency - low) / (high - low) * (after["rate"] - before["rate"])
    return None


def curve(job: tuple[Setup, str, str, float]) -> list[dict[str, Any]]:
    """Points at rising loads, until the mean is far beyond the target."""
    setup, scheduler, eviction, alpha = job
    points: list[dict[str, Any]] = []
    for share in SHARES:
        started = time.perf_counter()
        points.append(simulate(setup, scheduler, setup.capacity * share, eviction, alpha))
        wall = time.perf_counter() - started
        print(f"{setup.model} {scheduler} {eviction} {alpha} {share}: {points[-1]['per_token'][0]:.3f} s, {wall:.0f} s", file=sys.stderr)
        if points[-1]["per_token"][0] > 2 * TARGET:
            break
    return points


def main() -> int:
    jobs = [(setup, scheduler, "proactive", alpha) for setup in SETUPS for scheduler in SCHEDULERS for alpha in alphas(scheduler)]
    jobs += [(SETUPS[0], "mlfq", eviction, alpha) for alpha, eviction in WAYS if eviction != "proactive"]
    with concurrent.futures.ProcessPoolExecutor(max_workers=2) as pool:
        curves = list(pool.map(curve, jobs))
    loads = [
        {"model": s.model, "scheduler": name, "eviction": how, "alpha": alpha, "load_at_0.3": load_at(points, TARGET)}
        for (s, name, how, alpha), points in zip(jobs, curves, strict=True)
    ]
    results = {"requests": REQUESTS, "batch": BATCH, "host_bytes": HOST_BYTES, "loads": loads, "curves": curves}
    Path(__file__).with_name("results.json").write_text(json.dumps(results, indent=1) + "\n")
    for line in loads:
        print(line)
    return 0


def alphas(scheduler: str) -> tuple[float, ...]:
    return (0.3, 30.0) if scheduler == "mlfq" else (0.3,)


if __name__ == "__main__":
    raise SystemExit(main())
