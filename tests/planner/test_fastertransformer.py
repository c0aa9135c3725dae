"""MT-NLG 530B on A100s against FasterTransformer's measured times: specifications alone give a bound with a steady ratio."""

from __future__ import annotations

import pytest

from experiments.fastertransformer_mtnlg.measure import ROWS, predicted


@pytest.mark.parametrize("ways", [16, 32])
def test_the_ratio_is_steady_over_batches(ways: int) -> None:
    ratios = [row.measured_ms / predicted(row)["total"] for row in ROWS if row.ways == ways]
    assert min(ratios) > 1
    assert max(ratios) / min(ratios) < 1.25


def test_and_over_all_rows() -> None:
    ratios = [row.measured_ms / predicted(row)["total"] for row in ROWS]
    assert max(ratios) / min(ratios) < 1.5


def test_what_is_missing_at_batch_one_is_a_fixed_time() -> None:
    missing = [row.measured_ms - predicted(row)["total"] for row in ROWS if row.batch == 1]
    assert max(missing) / min(missing) < 1.1
