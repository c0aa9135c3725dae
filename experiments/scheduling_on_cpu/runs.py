"""One run of requests on the demo model: with the real engine, or simulated at given step times.

Every request asks for `repeat: n k =`, which the model answers with n times the letter and end-of-sequence, so the prompt controls the
length of the answer; solved tasks before it make it as long as it is to be. All answers are checked.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from partinf import api
from partinf.buckets import Capacity
from partinf.demo_tasks import MAX_NUMBER, Task, after_solved, make_task
from partinf.engine import Engine, Policy, RequestOutput
from partinf.engine.batch import ScheduledBatch
from partinf.engine.step import Step, StepOutput
from partinf.plans import Bucket
from partinf.simulation.arrivals import Arrival
from partinf.simulation.cost_runner import CostRunner
from partinf.simulation.play import Clock, WallClock, play
from partinf.simulation.step_price import Price
from partinf.workload import DType, Workload

ROWS = 16
_SOLVED_LEN = 5  # tokens of a solved task without its answer: repeat, number, letter, = and ;


class CpuClock:
    """Seconds of CPU that this process uses, and those that it would sleep: on this clock others on the machine take no time."""

    def __init__(self) -> None:
        self._slept = -time.process_time()

    def __call__(self) -> float:
        return time.process_time() + self._slept

    def advance_to(self, when: float) -> None:
        self._slept += max(0.0, when - self())


CLOCKS: dict[str, Callable[[], Clock]] = {"cpu": CpuClock, "wall": WallClock}


def add_clock(parser: argparse.ArgumentParser) -> None:
    """The flag that names one of `CLOCKS`."""
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, where others use the machine")


def clock_named_on_the_command_line() -> Callable[[], Clock]:
    parser = argparse.ArgumentParser()
    add_clock(parser)
    return CLOCKS[parser.parse_args().clock]


class StepTimes:
    """Time from one commit to the next by bucket; not that of a step before which the engine had nothing to do."""

    def __init__(self, model: api.Model) -> None:
        self._bucket_of = model.runner.bucket_of
        self._before = -math.inf
        self.seconds: dict[Bucket, list[float]] = defaultdict(list)

    def restart(self) -> None:
        """Another run, on another clock."""
        self._before = -math.inf

    def on_step(self, batch: ScheduledBatch, output: StepOutput, scheduled: float, committed: float) -> None:
        if any(sequence.request.arrival <= self._before for sequence in (*batch.decode, *batch.prefill)):
            self.seconds[self._bucket_of(batch.step)].append(committed - self._before)
        self._before = committed

    def means(self) -> dict[Bucket, float]:
        return {bucket: statistics.mean(times) for bucket, times in self.seconds.items()}


def load_demo(capacity: Capacity, residents: int = 0, num_host_pages: int = 0) -> api.Model:
    """The demo model on one device; `residents` sequences may hold pages, as many as are decoded together if not given."""
    workload = Workload(ROWS, 24, 36, weights=DType.F32, kv=DType.F32)
    plan = api.plan("demo", "cpu:1", workload, capacity=capacity)
    plan = replace(plan, cache=replace(plan.cache, num_slots=residents or plan.cache.num_slots))
    return api.load("demo", plan, num_host_pages=num_host_pages)


def figures(engine: Engine, seconds: float) -> dict[str, float]:
    summary = engine.metrics.summary()
    return {
        "throughput": summary.generated_tokens / seconds,
        "requests_per_second": summary.num_finished / seconds,
        "mean_completion": summary.completion_time.mean,
        "p95_completion": summary.completion_time.p95,
        "mean_per_token": summary.normalized_latency.mean,
        "p50_per_token": summary.normalized_latency.p50,
        "p95_per_token": summary.normalized_latency.p95,
        "mean_ttft": summary.ttft.mean,
        "iterations": summary.iterations,
        "mean_batch_size": summary.mean_batch_size,
        "swap_outs": summary.swap_outs,
        "preemptions": summary.preemptions,
    }


class Repeats:
    """Makes the prompts of arrivals, and knows their answers.

    Attributes:
        answers: by the id of the request, with the token that ends it.
    """

    def __init__(self, model: api.Model, arrivals: Sequence[Arrival]) -> None:
        self._rng = random.Random(0)
        self._tokenizer = model.tokenizer
        self._arrivals = arrivals
        self.answers: dict[str, tuple[int, ...]] = {}

    def __call__(self, number: int, length: int) -> list[int]:
        """A prompt of at most so many tokens, if that is enough for a task, and no more than five fewer."""
        task = make_task("repeat", self._rng, self._arrivals[number].output_len - 1)
        solved: list[Task] = []
        room = length - len(self._tokenizer.encode(task.prompt))
        while room >= _SOLVED_LEN + 1:
            size = min(MAX_NUMBER, room - _SOLVED_LEN)
            solved.append(make_task("repeat", self._rng, size))
            room -= _SOLVED_LEN + size
        _, *answer = self._tokenizer.encode(task.answer)
        self.answers[f"arrival-{number}"] = (*answer, *self._tokenizer.eos_ids)
        return list(self._tokenizer.encode(after_solved(solved, task).prompt))


class CheckedEngine(Engine):
    """Asserts that every answer is right as it is returned."""

    expected: dict[str, tuple[int, ...]]

    def step(self, *, wait: bool = True) -> list[RequestOutput]:
        ended = super().step(wait=wait)
        for output in ended:
            assert output.tokens == self.expected.pop(output.id), f"{output.id}: {output.tokens}"
        return ended


def real(model: api.Model, policy: Policy, arrivals: list[Arrival], clock: Clock, times: StepTimes | None = None) -> dict[str, float]:
    """What came of the arrivals, on a new clock."""
    prompts = Repeats(model, sorted(arrivals, key=lambda arrival: arrival.time))
    if times is not None:
        times.restart()
    engine = CheckedEngine(model.runner, policy=policy, clock=clock, on_step=times.on_step if times else None)
    engine.expected = prompts.answers
    refused = play(engine, arrivals, clock, prompt=prompts)
    assert (refused, prompts.answers) == (0, {}), "every request is answered"
    return figures(engine, clock() - arrivals[0].time)


def simulated(model: api.Model, policy: Policy, arrivals: list[Arrival], price: Callable[[Step], Price]) -> dict[str, float]:
    runner = CostRunner(model.runner.limits, price)
    engine = Engine(runner, policy=policy, clock=runner.clock)
    play(engine, arrivals, runner.clock)
    return figures(engine, runner.clock.now - arrivals[0].time)


def at(model: api.Model, seconds: dict[Bucket, float]) -> Callable[[Step], Price]:
    """Prices steps at measured times of their buckets."""

    def price(step: Step) -> Price:
        bucket = model.runner.bucket_of(step)
        return Price(seconds[bucket], bucket.num_tokens)

    return price
