"""`--slice auto:CHIP`: the cheapest slice that keeps the bound, against trying all of them by hand."""

from __future__ import annotations

import json

import pytest

from partinf.cli import main
from partinf.hardware.chips import chips
from partinf.planner.slices import slices_of

ASKED = ["plan", "--model", "llama-3-8b", "--phase", "decode", "--batch", "32", "--context", "1024"]
AUTO = [*ASKED, "--slice", "auto:v5e"]


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    assert main([*AUTO, *flags, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_cheapest_that_keeps_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    report = planned(capsys, "--max-latency-ms", "6", "--price-per-chip-hour", "1.2")
    met = [trial for trial in report["slices"] if trial["meets_bound"]]
    assert report["slice"] == met[0]["slice"]
    assert met[0]["chip_seconds"] == min(trial["chip_seconds"] for trial in met)
    assert met[0]["seconds"] == report["best"]["step_seconds"] <= 6e-3
    assert any(not trial["meets_bound"] for trial in report["slices"])
    hours = report["best"]["chip_ms_per_token"] * 1e-3 / 3600
    assert report["price_per_million_tokens"] == pytest.approx(1.2 * hours * 1e6)


def test_a_tighter_bound_never_costs_less(capsys: pytest.CaptureFixture[str]) -> None:
    costs = [planned(capsys, "--max-latency-ms", bound)["slices"][0]["chip_seconds"] for bound in ("100", "7", "4")]
    assert costs == sorted(costs)


def test_shapes_that_are_tried() -> None:
    assert [slice_.name for slice_ in slices_of(chips()["v5e"])] == [
        f"v5e:{shape}" for shape in ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
    ]
    assert [slice_.name for slice_ in slices_of(chips()["v4"], 64)] == [
        f"v4:{shape}" for shape in ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
    ]
    assert all(slice_.not_rented is None for chip in chips().values() for slice_ in slices_of(chip))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (AUTO, "needs --max-latency-ms, or --ttft and --tpot at --arrivals"),
        ([*AUTO, "--max-latency-ms", "0.01"], "no slice of v5e keeps 0.01 ms; the fastest, v5e:"),
        ([*AUTO, "--max-latency-ms", "9", "--mesh", "x:4"], "a mesh belongs to one slice"),
        ([*AUTO, "--max-latency-ms", "9", "--mesh", "auto"], "a mesh belongs to one slice"),
        ([*AUTO, "--max-latency-ms", "9", "--price-per-chip-hour", "-1"], "a positive number is needed"),
        ([*ASKED, "--slice", "auto:v5", "--max-latency-ms", "9"], "expected auto:CHIP; did you mean 'v5"),
        ([*ASKED, "--slice", "auto", "--max-latency-ms", "9"], "expected auto:CHIP; known: "),
        (["explain", *AUTO[1:]], "explain takes one slice"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    assert main(flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]


def test_a_slice_that_is_named_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--slice", "v5e:2x4", "--price-per-chip-hour", "1", "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "slices" not in report
    assert report["price_per_million_tokens"] > 0
