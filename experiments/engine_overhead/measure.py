"""What the engine costs besides the steps that it runs: wall time of the engine over a bare replay of the same steps. Writes results.json.

    python -m experiments.engine_overhead.measure        # some minutes

Llama of 125 M parameters with random weights on one CPU device, 32 lanes, a backlog of requests. A run of the engine is recorded step by
step. Its steps are then replayed bare, their arrays made beforehand: nothing but transfer, dispatch and the fetch of the tokens, one step
behind as in the engine. And they are replayed through the runner, which lays every step out anew. The three alternate. Besides the wall
time stand the CPU time of the process, all threads together, and that of the thread which drives the engine; others on the machine disturb
both less.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections import deque
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from experiments.results import write
from partinf import api
from partinf.buckets import Capacity
from partinf.engine import Engine, Orca, SamplingParams
from partinf.engine.batch import ScheduledBatch
from partinf.engine.step import Step, StepOutput
from partinf.execution.place import place_step
from partinf.execution.runner import JaxRunner
from partinf.transformer.batch import pack
from partinf.workload import DType, Workload

MODEL, ROWS, REQUESTS, PAIRS, LAG = "llama-125m", 32, 48, 5, 1
LENGTHS = (8, 24), (4, 20)  # prompts, answers


def requests(vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(1)
    prompts = [rng.choices(range(vocab_size), k=rng.randint(*LENGTHS[0])) for _ in range(REQUESTS)]
    return prompts, [SamplingParams(max_tokens=rng.randint(*LENGTHS[1]), ignore_eos=True) for _ in range(REQUESTS)]


class Times(NamedTuple):
    """Seconds: by the wall clock, of all CPUs for this process, and of them for the thread that drives it."""

    wall: float
    cpu: float
    host: float


class Stopwatch:
    def __init__(self) -> None:
        self._started = self._now()

    def __call__(self) -> Times:
        return Times(*(now - then for now, then in zip(self._now(), self._started, strict=True)))

    def _now(self) -> Times:
        return Times(time.perf_counter(), time.process_time(), time.thread_time())


def run_engine(runner: JaxRunner, steps: list[Step] | None = None) -> Times:
    """Time for all requests; the steps are recorded if a list is given."""

    def record(batch: ScheduledBatch, output: StepOutput, scheduled: float, committed: float) -> None:
        assert steps is not None
        steps.append(batch.step)

    engine = Engine(runner, policy=Orca(), lag=LAG, on_step=None if steps is None else record)
    prompts, params = requests(runner.limits.vocab_size)
    taken = Stopwatch()
    engine.generate(prompts, params)
    return taken()


def replay(runner: JaxRunner, steps: list[Step]) -> Times:
    """Time for the steps through the runner."""
    taken = Stopwatch()
    for number, step in enumerate(steps):
        runner.submit(step)
        if number >= LAG:
            runner.collect()
    for _ in range(LAG):
        runner.collect()
    return taken()


def replay_bare(runner: JaxRunner, steps: list[Step]) -> Times:
    """Time for the steps' programs on arrays that are there."""
    placed = [(runner.bucket_of(step), step) for step in steps]
    batches = [(runner._steps[bucket], pack([place_step(step, bucket, runner.plan, runner.limits).batch])) for bucket, step in placed]
    waiting: deque[Any] = deque()
    state, runner._state = runner._state, None
    taken = Stopwatch()
    for program, packed in batches:
        state, out = program(runner.params, state, jax.device_put(packed, runner._batch_sharding))
        waiting.append((out.tokens, out.logprobs))
        if len(waiting) > LAG:
            jax.device_get(waiting.popleft())
    for out in waiting:
        jax.device_get(out)
    times = taken()
    runner._state = state
    return times


def main() -> int:
    longest = LENGTHS[0][1] + LENGTHS[1][1]
    workload = Workload(ROWS, LENGTHS[0][1], LENGTHS[1][1], weights=DType.F32, kv=DType.F32)
    capacity = Capacity(max_rows=ROWS, max_len=longest, prefill_tokens=128, random=False, max_prompt_len=LENGTHS[0][1])
    runner = api.load(MODEL, api.plan(MODEL, "cpu:1", workload, capacity=capacity), random_weights=True).runner
    steps: list[Step] = []
    run_engine(runner, steps)
    ways = {"engine": lambda: run_engine(runner), "runner": lambda: replay(runner, steps), "bare": lambda: replay_bare(runner, steps)}
    times: dict[str, list[Times]] = {way: [] for way in ways}
    for number in range(PAIRS + 1):
        for way, run in ways.items():
            times[way].append(run())
        print(number, {way: [round(value, 3) for value in values[-1]] for way, values in times.items()}, file=sys.stderr)
    times = {way: values[1:] for way, values in times.items()}  # the first round has first-call costs

    def over_bare(way: str, clock: str) -> list[float]:
        return [getattr(a, clock) / getattr(b, clock) for a, b in zip(times[way], times["bare"], strict=True)]

    results = {
        "model": MODEL,
        "rows": ROWS,
        "requests": REQUESTS,
        "steps": len(steps),
        "rows_per_step": statistics.mean(step.num_rows for step in steps),
        "load_average": os.getloadavg()[0],
        "step_milliseconds": 1e3 * statistics.median(each.wall for each in times["bare"]) / len(steps),
        "over_bare": {clock: {way: statistics.median(over_bare(way, clock)) for way in ("engine", "runner")} for clock in Times._fields},
        "over_bare_each": {clock: {way: over_bare(way, clock) for way in ("engine", "runner")} for clock in Times._fields},
        "host_milliseconds_per_step": {way: 1e3 * statistics.median(each.host for each in times[way]) / len(steps) for way in ways},
        "seconds": {way: [each._asdict() for each in values] for way, values in times.items()},
    }
    write(__file__, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
