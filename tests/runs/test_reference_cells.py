"""The published cells as programs of the library's own, and the command that measures them on devices."""

from __future__ import annotations

import json

import pytest

from experiments.on_a_pod.reference import cells, main, planned, programs
from partinf.experiment.result import ledger_of

SEVEN = 7


def test_every_published_program_has_a_plan_on_its_own_slice() -> None:
    """Each cell lies in a bucket of its rows and keys, and is priced."""
    assert len(programs()) == SEVEN
    for one in programs().values():
        chosen = cells(one)
        assert chosen
        plan, buckets = planned(one, {}, chosen)
        assert plan.slice.name == one["machine"]
        assert plan.runnable is None
        for cell, bucket in zip(chosen, buckets, strict=True):
            assert bucket.decode_rows >= cell.batch
            assert bucket.decode_pages * plan.cache.page_size >= cell.context
            assert ledger_of(plan, bucket).seconds > 0


def test_what_cannot_be_measured_is_refused_before_any_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Qwen", "--context", "0", "--rounds", "0"]) == 2
    printed = capsys.readouterr().err
    for offence in ("no program 'Qwen'", "--context", "--rounds"):
        assert offence in printed
    assert main(["Qwen 3 8B bf16, sglang-jax", "--slice", "cpu:8"]) == 2
    assert "axis 'y'" in capsys.readouterr().err


@pytest.mark.slow
def test_cells_are_measured_next_to_their_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--slice", "cpu:2x4", "--model", "demo", "--weights", "f32", "--kv", "f32", "--context", "32", "--rounds", "2"]
    assert main(["Qwen 3 32B bf16, sglang-jax", *words]) == 0
    table, _, line = capsys.readouterr().out.rstrip().rpartition("\n")
    rows = json.loads(line)["rows"]
    assert [row["batch"] for row in rows] == [8, 32]
    for row in rows:
        assert row["measured"] > 0
        assert row["predicted_over_measured"] == pytest.approx(row["predicted"] / row["measured"])
    assert "published  predicted  measured" in table
