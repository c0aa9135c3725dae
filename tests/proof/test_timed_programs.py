"""The experiment that holds the walk against a program which others wrote and timed: how it reads what they say, and what it found."""

from __future__ import annotations

import json

import pytest

from experiments.timed_programs.measure import RESULTS, Cell, cells, summary

README = """For data parallelism = 1 and tensor parallelism = 16

| model   |  hardware   | batch size  | context length  |prefill (s)   | tok / s  | HBM BW util | comments    |
|---------|-------------|------------:|----------------:|-------------:|---------:|------------:|:------------|
| 3.1-70B | TPU v5e-16  |      8      |      2048       |    0.5       |   100    |    85.18%   | max tok/s   |

For data parallelism = 2 and tensor parallelism = 8

| 3.1-70B | TPU v5e-16  |     32      |      8192       |    1.35      |   62.5   |    38.13%   |             |
"""


def test_the_tables_of_their_readme_are_read() -> None:
    assert cells(README) == [Cell(1, 8, 2048, 0.01), Cell(2, 32, 8192, 0.016)]


def test_the_estimates_stay_near_what_was_timed() -> None:
    found = json.loads(RESULTS.read_text())
    rows, summed = found["rows"], found["summary"]
    assert summed == summary(rows)
    assert {row["batch"] for row in rows} == {8, 16, 32, 64, 128}
    assert summed["median"] <= 0.04
    assert summed["worst"] <= 0.15
    assert all(half["median"] <= 0.08 and half["p90"] <= 0.2 for half in summed["held_out"].values())
    assert summed["pairs"] == 12
    assert summed["ordered_wrong"] == [{"batch": 64, "context": 4096}]  # of the two layouts, which come within 2 % of each other there
    assert all(row["estimate"] >= row["bytes_alone"] for row in rows)
    assert all(row["ratio"] == pytest.approx(row["estimate"] / row["measured"], abs=2e-3) for row in rows)
