"""MT-NLG 530B on A100s against FasterTransformer's measured times: specifications alone give a bound."""

from __future__ import annotations

from experiments.fastertransformer_mtnlg.measure import ROWS, ledgers, predicted
from partinf.cost.ledger import Op


def test_specifications_are_a_bound_within_a_factor() -> None:
    ratios = [row.measured_ms / predicted(row)["total"] for row in ROWS]
    assert min(ratios) > 1
    assert max(ratios) / min(ratios) < 1.5


def test_what_is_missing_is_a_fixed_time_and_a_share_of_the_rates() -> None:
    """At batch 1 the same on 16 and 32 devices; without it the ratio is steady over batches and devices."""
    missing = {row.ways: row.measured_ms - predicted(row)["total"] for row in ROWS if row.batch == 1}
    assert max(missing.values()) / min(missing.values()) < 1.02
    ratios = [(row.measured_ms - missing[row.ways]) / predicted(row)["total"] for row in ROWS if row.batch > 1]
    assert min(ratios) > 1
    assert max(ratios) / min(ratios) < 1.2


def test_a_sublayer_ends_with_one_all_reduce() -> None:
    for ledger in ledgers(ROWS[0]):
        layers = [line for line in ledger.collectives if line.count > 105]
        assert [(line.op, line.count) for line in layers] == [(Op.ALL_REDUCE, 210)]
