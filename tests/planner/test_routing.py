"""What a router is expected to send where, against routings that were drawn."""

from __future__ import annotations

import numpy as np
import pytest

from partinf.cost.routing import Routed, expected_sent, popularity, routed

UNIFORM = [
    (128, 8, 1, 4, 1),
    (128, 8, 4, 8, 1),
    (128, 8, 32, 4, 1),
    (128, 8, 8, 128, 1),
    (8, 2, 16, 4, 2),
    (128, 4, 64, 8, 4),
    (256, 8, 256, 64, 1),
]
SKEWED = [(128, 8, 32, 4, 1), (128, 8, 96, 16, 1), (128, 4, 64, 8, 4), (8, 2, 64, 8, 1)]


def drawn(count: int, per_token: int, tokens: int, shards: int, groups: int, skew: float, times: int) -> Routed:
    """The same in the mean of so many draws. Popular experts lie anywhere; every token takes exactly `per_token` of them, each with its
    probability, by points one apart on a line on which the experts lie in random order with their probabilities as lengths."""
    rng, found = np.random.default_rng(count + tokens), []
    for _ in range(times):
        chosen = np.array(popularity(count, per_token, skew))[rng.permutation(count)]
        order = np.argsort(rng.random((groups, tokens, count)), axis=-1)
        ends = np.cumsum(chosen[order], axis=-1) - rng.random((groups, tokens, 1))
        taken = np.diff(np.floor(ends + 1e-9), axis=-1, prepend=-1.0) > 0
        each = np.zeros((groups, count))
        for group in range(groups):
            np.add.at(each[group], order[group][taken[group]], 1)
        parted = each.reshape(groups * shards, -1)
        hit, rows = (parted > 0).sum(-1), parted.sum(-1)
        found.append((hit.mean(), hit.max(), rows.mean(), rows.max()))
    return Routed(*np.mean(found, axis=0))


@pytest.mark.parametrize("shape", UNIFORM, ids=str)
def test_expectations_are_the_means_of_drawn_routings(shape: tuple[int, int, int, int, int]) -> None:
    expected, seen = routed(*shape), drawn(*shape, skew=0.0, times=60)
    assert expected.hit == pytest.approx(seen.hit, rel=0.02)
    assert expected.rows == pytest.approx(seen.rows, rel=1e-6)
    assert expected.most_hit == pytest.approx(seen.most_hit, rel=0.04)
    assert expected.most_rows == pytest.approx(seen.most_rows, rel=0.04)


@pytest.mark.parametrize("skew", [1.01, 1.2])
@pytest.mark.parametrize("shape", SKEWED, ids=str)
def test_skewed_routers_are_drawn_with_their_popularity(shape: tuple[int, int, int, int, int], skew: float) -> None:
    expected, seen = routed(*shape, skew=skew), drawn(*shape, skew=skew, times=60)
    assert expected.hit == pytest.approx(seen.hit, rel=0.06)
    assert expected.most_hit == pytest.approx(seen.most_hit, rel=0.08)
    assert expected.most_rows == pytest.approx(seen.most_rows, rel=0.2)


def test_one_token_hits_its_own_experts_and_no_more() -> None:
    assert routed(128, 8, 1, 1) == Routed(8.0, 8.0, 8.0, 8.0)
    assert routed(128, 8, 1, 128).most_rows == pytest.approx(1.0)
    assert routed(8, 8, 5, 4) == Routed(2.0, 2.0, 10.0, 10.0)


def test_one_device_has_all_rows_and_many_tokens_hit_all_experts() -> None:
    assert routed(128, 8, 100, 1).most_rows == 800
    assert routed(128, 8, 4096, 16).hit == pytest.approx(8.0)


@pytest.mark.parametrize("skew", [0.0, 1.01, 1.2, 2.5])
def test_probabilities_sum_to_the_experts_of_a_token(skew: float) -> None:
    chosen = popularity(128, 8, skew)
    assert sum(chosen) == pytest.approx(8.0)
    assert max(chosen) <= 1.0
    assert list(chosen) == sorted(chosen)


def test_skew_loads_the_fullest_device_more_and_hits_fewer_experts() -> None:
    loads = [routed(128, 8, 256, 8, 1, skew) for skew in (0.0, 1.01, 1.2)]
    assert loads[0].most_rows < loads[1].most_rows < loads[2].most_rows
    assert loads[0].hit > loads[1].hit > loads[2].hit


def test_rows_go_to_the_parts_that_hold_one_of_their_experts() -> None:
    assert expected_sent(8, 2, 28, 4) == pytest.approx(28 * (1 - (6 * 5) / (8 * 7)))
    assert expected_sent(8, 2, 10, 1) == 10
    assert expected_sent(8, 8, 10, 8) == 10
