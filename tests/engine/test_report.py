"""The figures of a run, worked out by hand."""

from __future__ import annotations

import pytest

from partinf.engine import Engine, SamplingParams
from partinf.engine.step import Step
from partinf.simulation.cost_runner import CostRunner
from partinf.simulation.report import LatencyBounds, Machine, RunReport
from partinf.simulation.step_price import Price
from tests.engine.support import ROOMY, run_all

MACHINE = Machine(num_params=1000, num_chips=2, peak_flops=1e4)


def padded_to_eight(step: Step) -> Price:
    """A prefill takes 2 s, a decode step 1 s."""
    return Price(2.0 if step.prefill else 1.0, 8)


def reported(bounds: LatencyBounds) -> RunReport:
    runner = CostRunner(ROOMY, padded_to_eight)
    engine = Engine(runner, clock=runner.clock)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=3), "a")
    engine.step()
    engine.add_request([1], SamplingParams(max_tokens=2), "b")
    run_all(engine)
    return RunReport.of(engine.metrics, runner.clock.now, 1, bounds, MACHINE)


def test_throughput_utilisation_and_padding() -> None:
    # Steps end at 2 (a's prompt), 4 (a decodes, b's prompt) and 5 s (both decode).
    found = reported(LatencyBounds())
    assert found.seconds == 5.0
    assert found.as_json()["throughput"] == {
        "requests_per_second": found.requests_per_second,
        "generated_tokens_per_second": found.generated_tokens_per_second,
        "prompt_tokens_per_second": found.prompt_tokens_per_second,
    }
    assert found.requests_per_second == 2 / 5
    assert found.generated_tokens_per_second == 5 / 5
    assert found.prompt_tokens_per_second == 4 / 5
    assert (found.summary.mean_batch_size, found.summary.occupancy) == (5 / 3, 5 / 3 / 8)
    assert found.padding == pytest.approx((24 - 7) / 24)
    assert found.mfu == pytest.approx(2 * 1000 * 7 / (2 * 1e4 * 5))
    assert found.chip_ms_per_token == pytest.approx(1e3 * 2 * 5 / 5)


def test_goodput_counts_what_meets_both_bounds_and_refusals_against_it() -> None:
    # First tokens after 2 and 2 s; a takes (5 - 2) / 2 s per further token, b 1 s.
    for bounds, good in (
        (LatencyBounds(2.0, 1.5), 2),
        (LatencyBounds(2.0, 1.0), 1),
        (LatencyBounds(1.9), 0),
        (LatencyBounds(time_per_token=1.2), 1),
    ):
        found = reported(bounds)
        assert found.goodput == pytest.approx(good / 3)
        assert found.good_requests_per_second == pytest.approx(good / 5)
        goodput = found.as_json()["goodput"]
        assert goodput == {
            "ttft_bound": bounds.ttft,
            "time_per_token_bound": bounds.time_per_token,
            "share": found.goodput,
            "requests_per_second": found.good_requests_per_second,
        }


def test_what_has_no_value_is_null() -> None:
    engine = Engine(CostRunner(ROOMY, padded_to_eight))
    found = RunReport.of(engine.metrics, 0.0, 0, LatencyBounds(), MACHINE)
    assert found.mfu is found.chip_ms_per_token is found.goodput is None
    figures = found.as_json()
    assert figures["mfu"] is figures["chip_ms_per_token"] is figures["goodput"]["share"] is None
    assert figures["latency"]["ttft"]["p99"] is None
