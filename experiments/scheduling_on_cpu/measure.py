"""Schedulers on the real engine, and the simulator against it: the demo model on one CPU device. Writes results.json.

    python -m experiments.scheduling_on_cpu.measure        # a minute

Step times, which contain the host's share, are measured per bucket in this process, under the same policy on a backlog of other requests
before every run; the simulator then predicts throughput and completion times of the arrivals at hand, at a load of 0.6 of what a backlog
reaches and for a finite backlog. Calibrating, real and simulated runs alternate; figures are medians of five.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from partinf import api
from partinf.buckets import Capacity
from partinf.engine import Engine, Policy
from partinf.engine.arrivals import Arrival, parse_arrivals, parse_lengths
from partinf.engine.batch import Batch
from partinf.engine.cost_runner import CostRunner
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.engine.simulation import WallClock, play
from partinf.engine.step import Step, StepOutput
from partinf.engine.step_price import Estimates, Price
from partinf.plans import Bucket
from partinf.workload import DType, Workload

ROWS, REPEATS = 16, 5
LENGTHS = "uniform:4-24:2-36"
REQUESTS = 150
SCHEDULERS = ("orca", "mlfq")
COMPARED = ("request-level", "orca", "fcfs", "mlfq", "srpt")


class StepTimes:
    """Time from one commit to the next by bucket, for runs in which the engine always has something to do."""

    def __init__(self, model: Any) -> None:
        self._fit = model.runner._fit
        self._before: float | None = None
        self.seconds: dict[Bucket, list[float]] = defaultdict(list)

    def restart(self) -> None:
        """Another run, on another clock."""
        self._before = None

    def on_step(self, batch: Batch, output: StepOutput, scheduled: float, committed: float) -> None:
        if self._before is not None:
            self.seconds[self._fit(batch.step)].append(committed - self._before)
        self._before = committed

    def means(self) -> dict[Bucket, float]:
        return {bucket: statistics.mean(times) for bucket, times in self.seconds.items()}


def load_demo() -> Any:
    workload = Workload(ROWS, 24, 36, weights=DType.F32, kv=DType.F32)
    capacity = Capacity(max_rows=ROWS, max_len=64, prefill_tokens=128, random=False, max_prompt_len=24)
    return api.load("demo", api.plan("demo", "local", workload, capacity=capacity))


def figures(engine: Engine, seconds: float) -> dict[str, float]:
    summary = engine.metrics.summary()
    return {
        "throughput": summary.generated_tokens / seconds,
        "mean_completion": summary.completion_time.mean,
        "p95_completion": summary.completion_time.p95,
        "iterations": summary.iterations,
    }


def real(model: Any, policy: Policy, arrivals: list[Arrival], times: StepTimes | None = None) -> dict[str, float]:
    clock, rng = WallClock(), random.Random(0)
    if times is not None:
        times.restart()
    engine = Engine(model.runner, policy=policy, clock=clock, on_step=times.on_step if times else None)
    play(engine, arrivals, clock, prompt=lambda _, length: rng.choices(range(model.plan.model.vocab_size), k=length))
    return figures(engine, clock() - arrivals[0].time)


def simulated(model: Any, policy: Policy, arrivals: list[Arrival], seconds: dict[Bucket, float]) -> dict[str, float]:
    def price(step: Step) -> Price:
        bucket = model.runner._fit(step)
        return Price(seconds[bucket], bucket.num_tokens)

    runner = CostRunner(model.runner.limits, price)
    engine = Engine(runner, policy=policy, clock=runner.clock)
    play(engine, arrivals, runner.clock)
    return figures(engine, runner.clock.now - arrivals[0].time)


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main() -> int:
    model = load_demo()
    lengths = parse_lengths(LENGTHS)
    backlog = parse_arrivals("backlog", lengths, REQUESTS)
    other = parse_arrivals("backlog", lengths, REQUESTS, seed=1)
    times = StepTimes(model)
    for _ in range(3):
        warm = real(model, make_policy("orca", PolicyOptions(ROWS), Estimates(lambda tokens: 0.0, 1e-3)), backlog, times)
    seconds = times.means()
    decode = min(value for bucket, value in seconds.items() if not bucket.prefill_tokens)
    prefill = max(value for bucket, value in seconds.items() if bucket.prefill_tokens)
    estimates = Estimates(lambda tokens: prefill, decode)
    rate = 0.6 * warm["throughput"] * REQUESTS / sum(arrival.output_len for arrival in backlog)
    loads = {"backlog": backlog, "load 0.6": parse_arrivals(f"poisson:{rate}", lengths, REQUESTS)}
    comparison = []
    for name, arrivals in loads.items():
        for scheduler in SCHEDULERS:
            pairs: dict[str, list[dict[str, float]]] = {"real": [], "simulated": []}
            for _ in range(REPEATS):
                fresh = StepTimes(model)
                real(model, make_policy(scheduler, PolicyOptions(ROWS), estimates), other, fresh)
                measured = seconds | fresh.means()
                pairs["real"].append(real(model, make_policy(scheduler, PolicyOptions(ROWS), estimates), arrivals))
                pairs["simulated"].append(simulated(model, make_policy(scheduler, PolicyOptions(ROWS), estimates), arrivals, measured))
            both = {kind: medians(runs) for kind, runs in pairs.items()}
            errors = {key: both["simulated"][key] / both["real"][key] - 1 for key in both["real"]}
            comparison.append({"load": name, "scheduler": scheduler, **both, "error": errors})
            print(name, scheduler, {key: f"{value:+.1%}" for key, value in errors.items()}, file=sys.stderr)
    rounds: dict[str, list[dict[str, float]]] = {scheduler: [] for scheduler in COMPARED}
    for _ in range(REPEATS):
        for scheduler, runs in rounds.items():
            runs.append(real(model, make_policy(scheduler, PolicyOptions(ROWS), estimates), backlog))
    results = {
        "rows": ROWS,
        "lengths": LENGTHS,
        "requests": REQUESTS,
        "step_seconds": {str(bucket): value for bucket, value in seconds.items()},
        "rate_at_0.6": rate,
        "simulator": comparison,
        "schedulers_on_a_backlog": {scheduler: medians(runs) for scheduler, runs in rounds.items()},
    }
    Path(__file__).with_name("results.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
