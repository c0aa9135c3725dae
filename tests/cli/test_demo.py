"""`partinf demo`: every layout answers every request, and the table says so."""

from __future__ import annotations

import re

import pytest

from partinf.cli import main


def test_every_layout_gives_the_right_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--requests", "20", "--slice", "cpu:2x2x2", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^\s*(.+?)\s+(\d+)/20\s+(\d+)\s.*?(\d+)\s*$", out, re.MULTILINE)
    names = ["chosen by the planner", "1D weight-stationary", "2D weight-stationary", "weight-gathered", "one device, not split"]
    assert [name for name, *_ in rows] == names
    assert all(int(right) >= 19 for _, right, *_ in rows)
    assert all(int(speed) > 0 for _, _, speed, _ in rows)
    assert "gains nothing from being split" in out
    request_level = re.search(r"would have taken\s+(\d+)\s+iterations", out)
    assert request_level is not None
    assert all(int(steps) < int(request_level[1]) for *_, steps in rows)


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--requests", "0"]) == 2
    assert "--requests 0" in capsys.readouterr().err
