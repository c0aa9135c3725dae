"""Layouts chosen by serving the beginning of a load under each of a few: by the share of requests in time, and always alike."""

from __future__ import annotations

import json

import pytest

from partinf.cli import main
from partinf.cost.calibration import calibration_for
from partinf.cost.pricing import Pricing
from partinf.engine.policies.registry import PolicyOptions
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout import readable_name
from partinf.model.load import load_model_config
from partinf.plans import Plan
from partinf.simulation.arrivals import Arrival, parse_arrivals, parse_lengths
from partinf.simulation.choice import MOST_LAYOUTS, Choice, Service, beginning, choose
from partinf.simulation.report import LatencyBounds
from partinf.simulation.serving_plan import Terms, Traffic, contenders, in_turn, serving_plan
from partinf.simulation.sizing import Sizing

MODEL, SLICE = load_model_config("llama-3-8b"), parse_slice("v5e-16")
ARRIVALS = parse_arrivals("poisson:2", parse_lengths("fixed:2048:24"), 12)
TRAFFIC = Traffic.of(ARRIVALS, 64)
BOUNDS = LatencyBounds(0.2, 0.006)
LOAD = ["--model", "llama-3-8b", "--slice", "v5e-16", "--lengths", "fixed:2048:24", "--requests", "12"]


def service(bounds: LatencyBounds, **sizing: int) -> Service:
    sizes = {"max_rows": 64, "max_residents": 64, "max_len": 2072, "prefill_tokens": 2072} | sizing
    return Service(Pricing(SLICE, calibration_for(SLICE.chip)), Sizing(**sizes), "fcfs", PolicyOptions(64), bounds)


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return contenders(MODEL, SLICE, TRAFFIC, Terms(), 4)


def test_a_layout_that_keeps_the_bounds_is_found_where_the_mean_iteration_misses_them(capsys: pytest.CaptureFixture[str]) -> None:
    """At two requests a second one or two are in flight, and another layout is faster for those than for a full batch."""
    by_iteration = choose(service(BOUNDS), [serving_plan(MODEL, SLICE, TRAFFIC)], ARRIVALS)
    assert by_iteration.best.in_time < 0.3
    assert main(["simulate", *LOAD, "--arrivals", "poisson:2", "--ttft", "200", "--tpot", "6", "--format", "json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["goodput"]["share"] == 1.0
    compared = figures["choice"]["layouts"]
    assert compared[0]["layout"] == figures["layout"]
    assert [one["in_time"] for one in compared] == sorted((one["in_time"] for one in compared), reverse=True)
    assert min(one["in_time"] for one in compared) < 0.3
    assert 2 <= len(compared) <= MOST_LAYOUTS


def test_the_choice_is_the_best_of_those_that_were_compared(plans: list[Plan]) -> None:
    assert len({id(plan) for plan in plans}) == 4
    found = choose(service(BOUNDS), plans, ARRIVALS)
    alone = [choose(service(BOUNDS), [plan], ARRIVALS).best for plan in plans]
    assert found.best.in_time == max(one.in_time for one in alone)
    assert (found.num_requests, found.num_unable, len(found.served)) == (12, 0, 4)
    assert found.keeps_bounds
    again = choose(service(BOUNDS), contenders(MODEL, SLICE, TRAFFIC, Terms(), 4), ARRIVALS)
    assert again.as_json() == found.as_json()
    assert str(found).startswith("chosen from 4 layouts by simulating 12 requests under each: 100% of them in time, against ")


def test_without_bounds_the_mean_time_per_token_decides(plans: list[Plan]) -> None:
    found = choose(service(LatencyBounds()), plans[:3], ARRIVALS[:6])
    assert [one.seconds_per_token for one in found.served] == sorted(one.seconds_per_token for one in found.served)
    assert "ms per token, against " in str(found)


def test_what_is_compared_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *LOAD[:-1], "6", "--tpot", "6"]) == 0
    assert "layout chosen from 8 layouts by simulating 6 requests under each" in capsys.readouterr().out
    for layout in ([], ["--layout", "ws-1d", "--tpot", "6"]):  # nothing was stated of the load, or the layout was
        assert main(["simulate", *LOAD[:-1], "6", *layout, "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["choice"] is None


def test_a_pool_that_holds_too_little_for_every_layout_is_refused(plans: list[Plan]) -> None:
    with pytest.raises(InvalidInput, match="2072"):
        choose(service(BOUNDS, kv_pages=8), plans, ARRIVALS)


def test_the_load_is_bounded_by_requests_and_by_tokens() -> None:
    assert len(beginning([Arrival(0.1 * i, 8, 1) for i in range(1000)])) == 200
    assert len(beginning([Arrival(0.1 * i, 8, 5000) for i in range(1000)])) == 2
    assert len(beginning([Arrival(0.0, 8, 1 << 20)])) == 1


def test_the_first_of_every_ranking_in_turn() -> None:
    a, b, c, d = "abcd"
    assert in_turn([[a, b, c], [a, c], [d]], 3) == [a, d, b]
    assert in_turn([[a], [a]], 8) == [a]


def test_traffic_knows_its_rate() -> None:
    assert Traffic.of([Arrival(0.0, 8, 4), Arrival(1.0, 8, 4), Arrival(2.0, 8, 4)], 8).rate == 1.0
    backlog = Traffic.of([Arrival(0.0, 8, 4)] * 3, 8)
    assert backlog.in_flight(1e-3) == 8
    assert Traffic(8, 8, 100, 2.0).in_flight(0.01) == 2
    assert Traffic(8, 8, 100, 0.01).in_flight(0.01) == 1


def test_names_of_the_layouts_stand_in_the_json(plans: list[Plan]) -> None:
    found: Choice = choose(service(BOUNDS), plans[:1], ARRIVALS[:2])
    assert found.as_json()["layouts"][0]["layout"] == readable_name(plans[0].layout, SLICE.axis_sizes)
