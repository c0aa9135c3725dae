"""Serving on H100, H200 and B200 against what engines were measured to take, on the rows that the repository holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from experiments.gpus_serving.measure import Fitted, fit, grouped
from experiments.gpus_serving.operations import CHIPS, collective_errors, collectives
from experiments.gpus_serving.rows import SELECTION, Row, compared, read

HERE = Path(__file__).parents[2] / "experiments" / "gpus_serving"
RESULTS = json.loads((HERE / "results.json").read_text())
FITTED = Fitted(**RESULTS["constants"])


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    found, _ = compared(read(SELECTION))
    return found


def test_steps_of_engines_are_met_on_every_chip(rows: list[Row]) -> None:
    by_chip = grouped(rows, FITTED.of, lambda row: row.chip)
    assert {chip: one["rows"] >= 60 for chip, one in by_chip.items()} == {"h100": True, "h200": True, "b200": True}
    for one in by_chip.values():
        assert 0.97 < one["median"] < 1.03
        assert one["median_error"] < 0.06
        assert 0.88 < one["P10"] < one["P90"] < 1.10
        assert 0.75 < one["least"] < one["most"] < 1.2
    for one in grouped(rows, FITTED.of, lambda row: f"{row.chip}, {row.ways}").values():
        assert 0.93 < one["median"] < 1.07  # no number of GPUs is too fast or too slow as a whole


def test_two_and_eight_gpus_are_met_by_what_one_and_four_say(rows: list[Row]) -> None:
    """Constants fitted to some numbers of GPUs are those of the others."""
    same_gpu = [row for row in rows if row.chip != "b200"]
    fitted = fit([row for row in same_gpu if row.ways in (1, 4)])
    unseen = grouped([row for row in same_gpu if row.ways in (2, 8)], fitted.of, lambda row: row.chip)
    assert all(0.95 < one["median"] < 1.05 and one["median_error"] < 0.06 for one in unseen.values())


def test_rows_left_out_of_the_fit_are_met_in_the_median_on_h100_and_h200() -> None:
    medians = [one["median"] for by_chip in RESULTS["left out"].values() for chip, one in by_chip.items() if chip != "b200"]
    assert len(medians) == 13
    assert all(0.9 < median < 1.1 for median in medians)


def test_collectives_of_a_node_take_a_fixed_time_and_one_for_each_further_device() -> None:
    for chip in CHIPS:
        fixed, hop, factor = collectives(chip, "nccl")
        assert fixed > hop > 0
        assert factor > 1
        assert median(abs(math.log(error)) for error in collective_errors(chip, "nccl")) < 0.11


def test_rows_that_cannot_be_the_work_that_they_state_are_not_compared(rows: list[Row]) -> None:
    row = next(row for row in rows if row.model == "llama-3-8b" and row.chip == "h100")
    of_campaign = [one for one in rows if one.campaign == row.campaign]
    faster = replace(row, id="answered from a cache", tpot=row.floor / 1.01)
    kept, why = compared([*of_campaign, faster])
    assert not kept
    assert "1 of" in why[row.campaign]
    crowded = replace(row, id="crowded", requests=100_000)
    kept, why = compared([*of_campaign, crowded])
    assert kept == of_campaign
    assert "do not fit into memory" in why[row.campaign]
