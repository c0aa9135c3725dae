"""The eight measured columns of the paper: predicted times, the choice of layout, and that the constants shipped are those fitted."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from experiments.calibrate_v4.fit import checks, serving
from experiments.calibrate_v4.measured import COLUMNS, Column, mfu, predict
from partinf.cost.calibration import calibration_for
from partinf.cost.program import LOOPED
from partinf.foundation import resources
from partinf.hardware.chips import chips
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner.report import PlanReport, search
from partinf.workload import Workload

RESULTS = Path(__file__).parents[2] / "experiments" / "calibrate_v4" / "results.json"
FFN = {"": "ws-2d", "xyz": "wg-xyz"}
IDS = [column.name for column in COLUMNS]
ALONE, TIE = "62B low-latency prefill", "62B high-throughput decode"


def test_errors_of_the_predicted_times() -> None:
    constants = calibration_for(chips()["v4"])
    errors = sorted(abs(predict(column, constants).seconds / column.seconds - 1) for column in COLUMNS)
    assert (errors[3] + errors[4]) / 2 <= 0.05
    assert errors[-1] <= 0.10
    for column in COLUMNS:
        assert abs(mfu(column, predict(column, constants).seconds) - column.mfu) <= 0.03, column.name


def test_figures_that_the_fit_did_not_see() -> None:
    found = checks(calibration_for(chips()["v4"]))
    step = found["bf16 decode at batch 64, ms"]
    assert step["predicted"] == pytest.approx(step["measured"], rel=0.05)
    for name in ("serial block, extra decode time", "offline 1984 in, 64 out, MFU"):
        assert found[name]["predicted"] == pytest.approx(found[name]["measured"], abs=0.03), name


def test_the_fit_generalises() -> None:
    """Each column predicted from the other seven."""
    assert max(map(abs, json.loads(RESULTS.read_text())["errors_when_left_out"].values())) <= 0.07


def test_shipped_constants_are_those_of_the_experiment() -> None:
    fitted = json.loads(RESULTS.read_text())["constants"]
    shipped = tomllib.loads(resources.package_file("hardware/calibration.toml").read_text())["v4"]
    for key, value in fitted.items():
        assert shipped[key] == pytest.approx(value, rel=2e-3), key


def ranked(column: Column) -> PlanReport:
    length = column.context if column.phase == "prefill" else 0
    workload = Workload(column.batch, length, context_len=None if length else column.context, phase=column.phase, weights=column.weights)
    return search(load_model_config(column.model), parse_slice(column.slice), workload, program=LOOPED)


@pytest.mark.parametrize("column", [c for c in COLUMNS if c.name not in (ALONE, TIE)], ids=lambda column: column.name)
def test_the_papers_layout_is_outright_first(column: Column) -> None:
    best = ranked(column).best
    assert best.fits
    assert (best.main.ffn, best.main.attention) == (FFN[column.gather], column.attention)


def test_on_eight_chips_the_papers_layout_is_a_tie() -> None:
    """X = ½·sqrt(n) is 1.4 there: 1D and 2D expose equal volumes."""
    column = COLUMNS[IDS.index(TIE)]
    report = ranked(column)
    mine = next(c for c in report.candidates if (c.main.ffn, c.main.attention) == ("ws-2d", "batch"))
    assert mine.tie_with_best
    assert report.best.main.ffn == "ws-1d"


def test_a_prefill_of_one_prompt_shares_the_storage_that_decode_wants() -> None:
    """Alone it would copy the weights, which no decode step could afford; together with decode the paper's layouts are first or a tie."""
    found = serving()
    assert found["540B"]["first"] == "E_x F_yz, prefill ws-2d/mixed, decode ws-2d/batch"
    for model in ("540B", "62B"):
        assert found[model]["first"].startswith("E_x F_yz, ")
        assert max(found[model][gap] for gap in ("gap", "prefill_gap", "decode_gap")) <= 0.05
