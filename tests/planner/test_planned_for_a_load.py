"""`plan` with bounds on single requests at a rate: the layout, or the slice, that serves them in time by simulation."""

from __future__ import annotations

import json

import pytest

from partinf.cli import main
from partinf.hardware.chips import chips
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner.question import Question
from partinf.planner.report import answer
from partinf.simulation.arrivals import parse_arrivals, parse_lengths
from partinf.simulation.planned import Load, planned, smallest_in_time
from partinf.simulation.report import LatencyBounds
from partinf.workload import Workload

MODEL = load_model_config("llama-3-8b")
WORKLOAD = Workload(64, 1024, 16, prefill_batch=1, arrival_rate=4.0)
ARRIVALS = parse_arrivals("poisson:4", parse_lengths("fixed:1024:16"), 12)
ASKED = ["plan", "--model", "llama-3-8b", "--batch", "64", "--input", "1024", "--output", "16"]


def load(ttft: float, tpot: float) -> Load:
    return Load(ARRIVALS, LatencyBounds(ttft, tpot))


def test_the_layout_that_serves_the_load_in_time_comes_first() -> None:
    """Others of those that were compared are late; all candidates stay, each once."""
    report = answer(Question(MODEL, WORKLOAD), parse_slice("v5e-16"))
    every = planned(report, load(10.0, 1.0)).choice
    assert every is not None
    times = [one.report.latencies["time_per_token"] for one in every.served]
    found = planned(report, load(10.0, (min(time.p99 for time in times) + max(time.p50 for time in times)) / 2))
    assert found.choice is not None
    assert found.in_time == max(one.in_time for one in found.choice.served) == 1.0
    assert found.accepted
    assert min(one.in_time for one in found.choice.served) < 0.5
    assert found.report.best.layout.storage == found.choice.best.plan.layout.storage
    assert sorted(map(id, found.report.candidates)) == sorted(map(id, report.candidates))


def test_the_smallest_slice_that_serves_the_load_in_time() -> None:
    question = Question(MODEL, WORKLOAD)
    loose, *none = smallest_in_time(question, chips()["v5e"], load(10.0, 1.0))
    assert (loose.accepted, none) == (True, [])
    assert loose.choice is not None
    fastest = min(one.report.latencies["time_per_token"].p50 for one in loose.choice.served)
    first, *smaller = smallest_in_time(question, chips()["v5e"], load(10.0, 0.9 * fastest))
    assert first.accepted
    assert first.report.slice.not_rented is None
    assert smaller
    assert all(not one.accepted and one.report.slice.num_chips < first.report.slice.num_chips for one in smaller)


def test_bounds_that_no_prompt_keeps_cost_no_simulation() -> None:
    found = planned(answer(Question(MODEL, WORKLOAD), parse_slice("v5e-8")), load(1e-4, 1.0))
    assert found.choice is None
    assert not found.accepted


def test_plan_says_what_it_compared(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*ASKED, "--slice", "v5e-16", "--layout", "ws-1d", "--layout", "ws-2d", "--arrivals", "4", "--ttft", "200", "--tpot", "20"]
    assert main([*flags, "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "v5e:4x4: layout chosen from 2 layouts by simulating 200 requests under each" in out
    assert "(prefill 1)" in out  # requests come one by one


def test_plan_finds_a_slice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--slice", "auto:v6e", "--arrivals", "4", "--ttft", "500", "--tpot", "50", "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["served"][0]["slice"] == report["slice"]
    assert report["served"][0]["in_time"] >= 0.99
    assert all(one["in_time"] < 0.99 for one in report["served"][1:])


def test_no_slice_serves_the_load_in_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partinf.simulation.planned.slices_of", lambda chip: [parse_slice("v5e-4"), parse_slice("v5e-8")])
    assert main([*ASKED, "--slice", "auto:v5e", "--arrivals", "1", "--ttft", "0.001"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no slice of v5e of up to 512 chips serves 99% of the requests in time; v5e:2x2 comes nearest with 0%" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--slice", "v5e-8", "--ttft", "100"], "--ttft: latency bounds need a load; give --arrivals"),
        (["--slice", "v5e-8", "--arrivals", "1", "--tpot", "0"], "--tpot 0: a positive number is needed"),
        (["--slice", "v5e-8", "--arrivals", "1", "--tpot", "9", "--mesh", "auto"], "layouts are simulated on one mesh for --tpot"),
        (["--slice", "auto:v5e", "--arrivals", "1"], "needs --max-latency-ms, or --ttft and --tpot at --arrivals"),
    ],
)
def test_bad_input(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
