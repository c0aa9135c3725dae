"""Serving on H100, H200 and B200 against what engines were measured to take, on the rows that the repository holds."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.gpus_serving.measure import Fitted, fit, grouped
from experiments.gpus_serving.operations import CHIPS, collectives
from experiments.gpus_serving.rows import SELECTION, Row, compared, read
from partinf.cost.collectives import Network
from partinf.cost.ledger import Op
from partinf.foundation import resources
from partinf.hardware.slices import parse_slice

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


def test_the_table_of_constants_holds_what_was_fitted() -> None:
    table = tomllib.loads(resources.package_file("hardware/calibration.toml").read_text())
    operations = json.loads((HERE / "operations.json").read_text())
    for chip in CHIPS:
        found = operations[chip]
        gpu = {"h200": "h100"}.get(chip, chip)
        whole = {name: RESULTS["constants"][name].get(gpu, found[name]) for name in ("hbm_share", "layer_seconds")}
        around = {name: found["nccl"][name] for name in ("collective_seconds", "hop_seconds", "collective_factor")}
        expected = {"matmul_efficiency": found["matmul_efficiency"], "switch_rings": True} | whole | around
        assert {name: table[chip][name] for name in expected} == expected
        if gpu in RESULTS["intervals"]:
            assert table[chip]["intervals"] == RESULTS["intervals"][gpu]
            unseen = RESULTS["left out, together"][chip]
            worst = max(unseen["most"] - 1, 1 - unseen["least"])
            assert table[chip]["left_out"] == pytest.approx([unseen["median_error"], worst])
        else:
            assert table[chip]["intervals"] == {name: found["between engines"][name] for name in table[chip]["intervals"]}


def test_collectives_of_a_node_take_a_hop_for_each_further_device_where_that_was_measured() -> None:
    slice_ = parse_slice("h100:8")
    axes = tuple(slice_.axis_sizes)
    at_once = Network(slice_, hop_seconds=1e-6, fixed_seconds=5e-6)
    around = Network(slice_, hop_seconds=1e-6, fixed_seconds=5e-6, switch_rings=True)
    assert [n.seconds(Op.ALL_REDUCE, axes, 0) for n in (at_once, around)] == pytest.approx([7e-6, 19e-6])
    assert [n.seconds(Op.ALL_GATHER, axes, 0) for n in (at_once, around)] == pytest.approx([6e-6, 12e-6])
    moved = around.seconds(Op.ALL_GATHER, axes, 8e6) - around.seconds(Op.ALL_GATHER, axes, 0)
    assert moved == pytest.approx(7e6 / slice_.chip.switch_bandwidth)  # rings change the waiting, not the bytes
    for chip in CHIPS:
        fixed, hop, factor = collectives(chip, "nccl")
        assert fixed > hop > 0
        assert factor > 1


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
