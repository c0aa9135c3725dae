"""Published measurements against the cost model: medians that must not get worse, held-out halves, floors, and what the fits shipped."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

from experiments.published.accuracy import faster, figures, table
from experiments.published.fit import halves, timed
from experiments.published.rows import Engine, least, predicted, rows, step, unpriced
from experiments.published.sets import sets
from partinf.cost.calibration import calibration_for
from partinf.hardware.chips import chips

RESULTS = json.loads((Path(__file__).parents[2] / "experiments" / "published" / "results.json").read_text())
ENGINES = {name: Engine(**values) for name, values in RESULTS["fits"]["engines"].items()}
V5E = timed("v5e")
DECODE = [row for row in V5E if row.what == "decode"]


def errors(chip: str, what: str, engine: str = "") -> list[float]:
    return sorted(abs(predicted(r, engines=ENGINES) / r.seconds - 1) for r in rows() if (r.chip, r.what, r.engine) == (chip, what, engine))


@pytest.mark.parametrize(
    ("chip", "what", "engine", "middle", "worst"),
    [
        ("v5e", "decode", "", 0.04, 0.15),
        ("v5e", "prefill", "", 0.09, 0.15),
        ("v4", "decode", "", 0.05, 0.1),
        ("v4", "prefill", "", 0.05, 0.1),
        ("v6e", "decode", "sglang-jax", 0.05, 0.12),
        ("v6e", "decode", "vLLM TPU", 0.08, 0.15),
        ("v5e", "collective", "", 0.07, 0.07),
        ("v6e", "collective", "", 0.04, 0.04),
        ("v5p", "collective", "", 0.04, 0.04),
    ],
)
def test_published_times_are_predicted(chip: str, what: str, engine: str, middle: float, worst: float) -> None:
    found = errors(chip, what, engine)
    assert median(found) <= middle
    assert found[-1] <= worst


def test_all_cells_of_the_published_table_are_there() -> None:
    assert len(DECODE) == 24
    assert len(V5E) == 48


def test_no_prediction_is_below_what_the_bytes_allow() -> None:
    assert all(predicted(row) >= least(row) for row in rows() if row.what in ("decode", "prefill"))


def test_the_faster_layout_is_predicted_at_every_batch() -> None:
    found = list(faster([figures(row, {}, {}) for row in DECODE]))
    assert [batch for batch, _, _ in found] == [f"batch {size}" for size in (8, 16, 32, 64, 128)]
    assert all(measured == predicted for _, measured, predicted in found)
    assert len({measured for _, measured, _ in found}) == 2  # they cross


def test_each_half_predicts_the_other() -> None:
    found = RESULTS["fits"]["v5e_held_out"]
    assert set(found) == {f"{name}, {half} half" for name in halves(V5E) for half in ("first", "second")}
    assert max(one["median"] for one in found.values()) <= 0.08
    assert max(one["ninth_decile"] for one in found.values()) <= 0.2


def test_rows_of_an_engine_are_predicted_from_its_rows_of_another_model() -> None:
    found = RESULTS["fits"]["engines_held_out"]
    for name in ENGINES:
        assert found[f"{name}, each from the other"]["rows"] == len(timed("v6e", name))
        assert found[f"{name}, each from the other"]["median"] <= 0.12


def test_an_engine_with_no_more_rows_than_constants_has_none() -> None:
    alone = [row for row in rows() if row.engine and row.engine not in ENGINES]
    assert alone
    assert all(predicted(row, engines=ENGINES) == predicted(row) for row in alone)
    assert median(abs(predicted(row) / row.seconds - 1) for row in alone) <= 0.12


def test_shipped_constants_and_their_record_are_those_of_the_experiment() -> None:
    shipped, fitted = calibration_for(chips()["v5e"]), RESULTS["fits"]["v5e"]
    for key, value in fitted.items():
        assert getattr(shipped, key) == pytest.approx(value, rel=5e-3), key
    held_out = RESULTS["fits"]["v5e_held_out"].values()
    assert shipped.left_out == pytest.approx((max(one["median"] for one in held_out), max(one["worst"] for one in held_out)), abs=2e-3)
    recorded = {(row["set"], row["what"], row["row"]): row["planner"] for row in RESULTS["rows"]}
    for row in rows():
        assert predicted(row, engines=ENGINES) == pytest.approx(recorded[row.set, row.what, row.label], rel=1e-3), row


def test_the_page_shows_what_the_command_found() -> None:
    page = (Path(__file__).parents[2] / "docs" / "accuracy.md").read_text()
    assert "\n".join(table(RESULTS)) in page
    assert "../experiments/published/accuracy.png" in page


def test_every_set_says_where_it_comes_from() -> None:
    for one in sets():
        assert all(one[key] for key in ("name", "source", "date", "machine", "note")), one["name"]
        assert one["rows"]
        assert one.get("priced", True) == (one not in unpriced())


def test_constants_lie_in_their_stated_intervals() -> None:
    for name in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
        constants = calibration_for(chips()[name])
        assert constants.name == name
        for key, (low, high) in constants.intervals.items():
            assert low <= getattr(constants, key) <= high, (name, key)


def test_core_and_memory_are_two_queues() -> None:
    """What waits for HBM alone passes while others leave HBM alone, and no more of it."""
    for row in DECODE:
        ledger = step(row, calibration_for(chips()["v5e"]))
        alone = sum(entry.seconds * entry.count for entry in ledger.entries)
        hidden = sum(entry.overlapped * entry.count for entry in ledger.entries)
        early = sum(entry.early * entry.count for entry in ledger.entries)
        free = sum(entry.free * entry.count for entry in ledger.entries)
        assert hidden == pytest.approx(min(early, free))
        assert ledger.seconds == pytest.approx(alone - hidden)
