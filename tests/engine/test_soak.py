"""A short run of experiments/soak: more load than the engine can carry, with everything that clients do."""

from __future__ import annotations

import pytest

from experiments.soak.run import LEGS, soak


@pytest.mark.slow
def test_overload_leaves_nothing_behind_and_harms_no_request() -> None:
    results = soak(20.0, LEGS[:4])
    assert results["problems"] == []
    assert all(leg["right"] == leg["plain"] > 0 for leg in results["legs"])
