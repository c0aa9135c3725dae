"""FastServe's evaluation in the simulator: chat lengths, batch 16, OPT models on A100-40GB, schedulers over load.

    python -m experiments.fastserve_opt_on_a100.measure [PART …] [--only TEXT]      # writes into results.json, by default all of it

Parts: `opt-13b`, `opt-66b`, `opt-175b` (every scheduler, over loads up to a backlog), `evictions` (what becomes of preempted pages),
`requests` (the same loads with more requests), `sustained` (2000 requests at loads that a batch keeps up with). A part's curves replace
those of the same name and leave the others; `--only` takes the curves whose name holds the text. Figures are mean, P95 and P99 of
completion time and of latency per generated token, and the load that each scheduler carries at a mean of 0.3 s per token.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

from experiments.results import read, write
from partinf.cost.calibration import calibration_for
from partinf.cost.pricing import Pricing
from partinf.cost.program import LOOPED
from partinf.engine import Engine, Policy
from partinf.engine.estimates import Estimates
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.hardware.slices import DCN_AXIS, parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Plan
from partinf.simulation.arrivals import chat_lengths, parse_arrivals
from partinf.simulation.play import play
from partinf.simulation.sizing import Sizing, cost_runner

REQUESTS, BATCH, TARGET = 400, 16, 0.3
HOST_BYTES = 128e9  # per GPU, for swapped pages
PUBLISHED = "mlfq, as published"  # promotes requests that wait for 3 s, every 1000 iterations


@dataclass(frozen=True)
class Setup:
    """A model on its GPUs.

    Attributes:
        capacity: requests per second that full batches answer, about.
    """

    model: str
    slice: str
    capacity: float


SETUPS = {
    "opt-13b": Setup("opt-13b", "a100-40:1", 1.34),
    "opt-66b": Setup("opt-66b", "a100-40:8", 1.64),
    "opt-175b": Setup("opt-175b", "a100-40:8*2", 1.35),
}
SHARES = (0.6, 0.9, 1.1, 1.3, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 4.0, 6.0, 10.0, math.inf)  # of the capacity; the last is a backlog


@dataclass(frozen=True)
class Curve:
    """A scheduler at rising loads.

    Attributes:
        scheduler: a name of `partinf simulate`, or `PUBLISHED`. shares: loads over the setup's capacity.
    """

    setup: Setup
    scheduler: str
    alpha: float = 0.3
    eviction: str = "proactive"
    requests: int = REQUESTS
    shares: tuple[float, ...] = SHARES

    @property
    def label(self) -> str:
        return f"{self.scheduler}, α {self.alpha:g} s" if self.scheduler in ("mlfq", "mlfq-naive") else self.scheduler

    @property
    def name(self) -> str:
        return f"{self.setup.model}: {self.label}, {self.eviction}, {self.requests} requests"

    def policy(self, estimates: Estimates) -> Policy:
        how = Eviction(self.eviction)
        if self.scheduler == PUBLISHED:
            return MultiLevelFeedbackQueue(estimates, BATCH, alpha=3.0, pages=Pages(how, estimates), promotion_period=1000)
        return make_policy(self.scheduler, PolicyOptions(BATCH, self.alpha, how), estimates)


SCHEDULERS = (
    ("fcfs", 0.3),
    ("orca", 0.3),
    ("mlfq", 0.3),
    ("mlfq", 3.0),
    ("mlfq", 30.0),
    (PUBLISHED, 3.0),
    ("mlfq-naive", 0.3),
    ("srpt", 0.3),
)
SMALL = SETUPS["opt-13b"]
FEW = (0.6, 0.9, 1.1, 1.5, 2.0, math.inf)  # for the oracle, whose means stay low
BELOW, AROUND = (0.7, 0.8, 0.9, 0.95), (1.0, 1.1, 1.2, 1.4, 1.6, 2.0, 2.5)
PARTS: dict[str, list[Curve]] = {
    model: [Curve(setup, name, alpha, shares=FEW if name == "srpt" else SHARES) for name, alpha in SCHEDULERS]
    for model, setup in SETUPS.items()
} | {
    "evictions": [Curve(SMALL, "mlfq", alpha, how) for how in ("reactive", "recompute") for alpha in (0.3, 3.0, 30.0)]
    + [Curve(SMALL, PUBLISHED, 3.0, how) for how in ("reactive", "recompute")],
    "requests": [Curve(SMALL, name, a, requests=1000, shares=AROUND) for name, a in SCHEDULERS if name in ("fcfs", "mlfq", PUBLISHED)],
    "sustained": [Curve(SMALL, name, a, requests=2000, shares=BELOW) for name, a in SCHEDULERS],
}


def simulate(curve: Curve, rate: float) -> dict[str, Any]:
    """A curve's scheduler at one load; an infinite rate is a backlog."""
    setup = curve.setup
    slice_ = parse_slice(setup.slice)
    axes = list(slice_.axis_sizes)
    within = [axis for axis in axes if axis != DCN_AXIS]
    storage, attention = dict.fromkeys(axes, "stage") | dict.fromkeys(within, "ffn"), dict.fromkeys(axes, "none")
    plan = Plan(load_model_config(setup.model), slice_, make_layout(storage, attention | dict.fromkeys(within, "heads")))
    sizing = Sizing(BATCH, 16 * BATCH, 2048, 4096, host_bytes=HOST_BYTES)
    runner, price = cost_runner(plan, Pricing(slice_, calibration_for(slice_.chip), program=LOOPED), sizing)
    engine = Engine(runner, policy=curve.policy(price.estimates(runner.limits)), clock=runner.clock)
    how = f"poisson:{rate}" if math.isfinite(rate) else "backlog"
    arrivals = parse_arrivals(how, chat_lengths, curve.requests, seed=0)
    play(engine, arrivals, runner.clock, next_finish=lambda: runner.next_finish)
    summary = engine.metrics.summary()

    def three(values: Any) -> list[float]:
        return [values.mean, values.p95, values.p99]

    return {
        "rate": rate if math.isfinite(rate) else None,
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
    """Load at a mean latency per token, linear between the points of a curve; None when it is beyond the last rate."""
    for before, after in itertools.pairwise(point for point in points if point["rate"] is not None):
        low, high = before["per_token"][0], after["per_token"][0]
        if low <= latency < high:
            return before["rate"] + (latency - low) / (high - low) * (after["rate"] - before["rate"])
    return None


def measured(curve: Curve) -> dict[str, Any]:
    """Points at rising loads, until the mean is beyond the target."""
    points: list[dict[str, Any]] = []
    for share in curve.shares:
        started = time.perf_counter()
        points.append(simulate(curve, curve.setup.capacity * share))
        wall = time.perf_counter() - started
        print(f"{curve.name}, {share:g}: {points[-1]['per_token'][0]:.3f} s, {wall:.0f} s", file=sys.stderr)
        if points[-1]["per_token"][0] > TARGET:
            break
    return {
        "model": curve.setup.model,
        "label": curve.label,
        "eviction": curve.eviction,
        "requests": curve.requests,
        "capacity": curve.setup.capacity,
        "load_at_0.3": load_at(points, TARGET),
        "points": points,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--only", default="", metavar="TEXT")
    args = parser.parse_args()
    for part in args.parts or PARTS:
        for curve in PARTS[part]:
            if args.only in curve.name:
                found = measured(curve)
                results: dict[str, Any] = read(__file__, missing={})
                results.setdefault(part, {})[curve.name] = found
                write(__file__, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
