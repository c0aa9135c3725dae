"""Times and counters, worked out by hand on a clock that the test moves."""

from __future__ import annotations

import math

import pytest

from partinf.engine import Distribution, Engine, FakeRunner, FinishReason, SamplingParams
from partinf.engine.metrics import Metrics
from partinf.engine.step import Step, StepOutput
from tests.engine.support import ROOMY, Ticks, run_all


class TimedRunner(FakeRunner):
    """Every step takes ten seconds, and is padded to eight tokens."""

    def __init__(self, clock: Ticks) -> None:
        super().__init__(ROOMY)
        self._clock = clock

    def collect(self) -> StepOutput:
        self._clock.now += 10
        output = super().collect()
        return StepOutput(output.decode, output.prefill, padded_tokens=8)


def test_times_of_requests() -> None:
    clock = Ticks()
    engine = Engine(TimedRunner(clock), clock=clock)
    clock.now = 100.0
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=4), "a")
    clock.now = 105.0
    first = engine.step()
    clock.now = 117.0
    engine.add_request([1], SamplingParams(max_tokens=1), "b")
    outputs = run_all(engine)
    assert first == []
    a, b = outputs["a"], outputs["b"]
    # Iterations end at 115, 127, 137, 147.
    assert (a.ttft, a.time_per_token, a.times.completion_time) == (15.0, pytest.approx(32 / 3), 47.0)
    assert (a.times.started, a.times.normalized_latency) == (105.0, 47 / 4)
    assert (b.ttft, b.time_per_token, b.times.completion_time) == (10.0, None, 10.0)
    summary = engine.metrics.summary()
    assert (summary.iterations, summary.prefill_tokens, summary.decode_tokens, summary.padding_tokens) == (4, 4, 3, 32 - 7)
    assert (summary.generated_tokens, summary.dropped_tokens, summary.num_finished) == (5, 0, 2)
    assert (summary.mean_batch_size, summary.occupancy) == (5 / 4, 5 / 32)
    assert (summary.busy_seconds, summary.tokens_per_second) == (40.0, 5 / 40)
    assert summary.finished == {FinishReason.LENGTH: 2}
    assert (summary.ttft.mean, summary.ttft.p50, summary.ttft.p99) == (12.5, 10.0, 15.0)
    assert summary.time_per_token.count == 1
    engine.metrics.clear()
    assert engine.metrics.summary().iterations == 0
    assert engine.metrics.summary().finished == {}


def test_a_request_cancelled_before_it_ran_has_no_times() -> None:
    engine = Engine(FakeRunner(ROOMY))
    engine.add_request([1], request_id="never ran")
    engine.cancel("never ran")
    (output,) = engine.step()
    assert (output.ttft, output.time_per_token, output.times.normalized_latency) == (None, None, None)
    assert output.times.completion_time is not None
    assert output.num_iterations == 0


def test_dead_lanes_are_counted() -> None:
    engine = Engine(FakeRunner(ROOMY, lambda context: context[-1] + 1), lag=1)
    (output,) = engine.generate([[1]], SamplingParams(max_tokens=9, stop_token_ids=(4,)))
    assert output.tokens == (2, 3, 4)
    engine.step()
    assert engine.metrics.dropped_tokens == 1


def test_distribution() -> None:
    values = Distribution.of([None, *range(100, 0, -1)])
    assert (values.count, values.mean, values.p50, values.p95, values.p99) == (100, 50.5, 50, 95, 99)
    assert math.isnan(Distribution.of([]).mean)


def test_nothing_counted_is_zero() -> None:
    summary = Metrics(4).summary()
    assert (summary.mean_batch_size, summary.tokens_per_second, summary.num_finished) == (0.0, 0.0, 0)
    metrics = Metrics(4)
    metrics.record_step(Step(), StepOutput())
    assert metrics.padding_tokens == 0
