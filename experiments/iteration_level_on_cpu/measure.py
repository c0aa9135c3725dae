"""Iteration-level over request-level throughput on the real engine, against what the iterations would give. Writes results.json.

    python -m experiments.iteration_level_on_cpu.measure [--clock cpu]        # ten minutes on two cores

Llama of 125 M parameters with random weights on one CPU device, 32 sequences per iteration, a backlog of requests with Orca's lengths
divided by four. The same requests run under request-level and under iteration-level scheduling in turns. The ideal ratio has no engine in
it: how often each policy runs which of the compiled steps, times what its steps of that kind take, measured in the same round by handing
recorded ones to the runner one after the other. Next to it stand the ratio of a machine whose steps cost what their tokens cost,
and what the simulator says with the rates of `partinf calibrate`. With `--clock cpu` seconds are those of CPU that the process uses, all
its threads together, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from experiments.results import write
from experiments.scheduling_on_cpu.calibrated import calibrated_price, calibrated_slice
from partinf import api
from partinf.buckets import Capacity
from partinf.engine import Engine, Orca, Policy, RequestLevel, SamplingParams, request_level_iterations
from partinf.engine.batch import ScheduledBatch
from partinf.engine.step import Step, StepOutput
from partinf.execution.runner import JaxRunner
from partinf.simulation.step_price import StepPrice
from partinf.workload import DType, Workload

Clock = Callable[[], float]

MODEL, ROWS, REQUESTS, ROUNDS, LAG = "llama-125m", 32, 64, 5, 1
SCALE = 4  # Orca draws prompts from U(32, 512) and answers from U(1, 128)
INPUT, OUTPUT = (32 // SCALE, 512 // SCALE), (1, 128 // SCALE)
SAMPLED = 8  # steps of each policy and kind that are timed by themselves in a round
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
POLICIES = ("request-level", "iteration-level")


def policy(name: str) -> Policy:
    return RequestLevel(ROWS) if name == "request-level" else Orca(ROWS)


def requests(vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(0)
    prompts = [rng.choices(range(vocab_size), k=rng.randint(*INPUT)) for _ in range(REQUESTS)]
    return prompts, [SamplingParams(max_tokens=rng.randint(*OUTPUT), ignore_eos=True) for _ in range(REQUESTS)]


def serve(runner: JaxRunner, name: str, steps: list[Step], clock: Clock) -> float:
    """Seconds for all requests; the steps are added to the list."""

    def record(batch: ScheduledBatch, output: StepOutput, scheduled: float, committed: float) -> None:
        steps.append(batch.step)

    prompts, params = requests(runner.limits.vocab_size)
    engine = Engine(runner, policy=policy(name), lag=LAG, on_step=record)
    started = clock()
    outputs = engine.generate(prompts, params)
    taken = clock() - started
    assert [len(output.tokens) for output in outputs] == [each.max_tokens for each in params]
    return taken


def kind(runner: JaxRunner, step: Step) -> str:
    """Which of the compiled steps runs it."""
    tokens = runner.bucket_of(step).prefill_tokens
    return f"{tokens} prompt tokens" if tokens else "decode"


def step_seconds(runner: JaxRunner, steps: Sequence[Step], clock: Clock) -> float:
    """Mean time of recorded steps, one after the other and as far ahead as in the engine."""
    started = clock()
    for number, step in enumerate(steps):
        runner.submit(step)
        if number >= LAG:
            runner.collect()
    for _ in range(min(LAG, len(steps))):
        runner.collect()
    return (clock() - started) / len(steps)


def alone(runner: JaxRunner, steps: Sequence[Step], clock: Clock) -> dict[str, float]:
    """Mean time of a policy's steps by kind, over some that are spread evenly."""
    found = {}
    for which in sorted({kind(runner, step) for step in steps}):
        mine = [step for step in steps if kind(runner, step) == which]
        found[which] = step_seconds(runner, [mine[number * len(mine) // SAMPLED] for number in range(SAMPLED)], clock)
    return found


def by_tokens(seconds: dict[str, float], bucket_tokens: int) -> dict[str, float]:
    """Both policies on a machine whose prefills cost what their tokens cost: every policy's fewest decode iterations, and the prompts."""
    prompts, params = requests(2)
    lens = [each.max_tokens for each in params]
    full = seconds[f"{bucket_tokens} prompt tokens"]
    prefill = sum(map(len, prompts)) * (full - seconds["decode"]) / bucket_tokens
    fewest = {"request-level": request_level_iterations(lens, ROWS), "iteration-level": -(-sum(lens) // ROWS)}
    return {name: prefill + iterations * seconds["decode"] for name, iterations in fewest.items()}


def simulated(price: StepPrice, recorded: dict[str, list[Step]]) -> dict[str, float]:
    """Seconds of each policy's steps at the prices of the calibrated hardware file; a backlog has no gaps."""
    return {name: sum(price(step).seconds for step in steps) for name, steps in recorded.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    name_of_clock = parser.parse_args().clock
    clock = CLOCKS[name_of_clock]
    slice_ = calibrated_slice(seconds=15)
    workload = Workload(ROWS, INPUT[1], OUTPUT[1], weights=DType.F32, kv=DType.F32)
    capacity = Capacity(max_rows=ROWS, max_len=INPUT[1] + OUTPUT[1], prefill_tokens=INPUT[1], random=False, max_prompt_len=INPUT[1])
    plan = api.plan(MODEL, "cpu:1", workload, capacity=capacity)
    runner = api.load(MODEL, plan, random_weights=True).runner
    recorded: dict[str, list[Step]] = {name: [] for name in POLICIES}
    for name, steps in recorded.items():
        serve(runner, name, steps, clock)  # first-call costs
    counts = {name: Counter(kind(runner, step) for step in steps) for name, steps in recorded.items()}
    tokens = sum(each.max_tokens for each in requests(2)[1])
    rounds = []
    for number in range(ROUNDS):
        taken = {}
        for name in POLICIES if number % 2 == 0 else POLICIES[::-1]:
            steps: list[Step] = []
            taken[name] = serve(runner, name, steps, clock)
            assert Counter(kind(runner, step) for step in steps) == counts[name], "a backlog is scheduled alike every time"
        bare = {name: alone(runner, recorded[name], clock) for name in POLICIES}
        ideal = {name: sum(count * bare[name][which] for which, count in counts[name].items()) for name in POLICIES}
        free = by_tokens(bare["request-level"], INPUT[1])
        ratios = {way: each["request-level"] / each["iteration-level"] for way, each in (("real", taken), ("ideal", ideal), ("free", free))}
        rounds.append({"seconds": taken, "step_seconds": bare, "ideal_seconds": ideal, **ratios, "share": ratios["real"] / ratios["ideal"]})
        print(number, {key: rounds[-1][key] for key in ("seconds", "step_seconds", "real", "ideal", "free", "share")}, file=sys.stderr)
    prices = simulated(calibrated_price(plan, slice_), recorded)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],
        "clock": name_of_clock,
        "model": MODEL,
        "rows": ROWS,
        "requests": REQUESTS,
        "lengths": {"input": INPUT, "output": OUTPUT, "scale": SCALE},
        "generated_tokens": tokens,
        "steps": {name: dict(count) for name, count in counts.items()},
        "iterations": {name: count.total() for name, count in counts.items()},
        "buckets": [str(bucket) for bucket in plan.buckets],
        "closed_form": request_level_iterations([each.max_tokens for each in requests(2)[1]], ROWS),
        "median": {key: statistics.median(each[key] for each in rounds) for key in ("real", "ideal", "free", "share")},
        "throughput": {name: tokens / statistics.median(each["seconds"][name] for each in rounds) for name in POLICIES},
        "calibrated_seconds": prices,
        "calibrated_ratio": prices["request-level"] / prices["iteration-level"],
        "rounds": rounds,
    }
    write(__file__, results)
    print(json.dumps({key: value for key, value in results.items() if key != "rounds"}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
