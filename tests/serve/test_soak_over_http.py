"""A short run of experiments/soak over HTTP: `partinf serve` with every field that clients send, and clients that leave."""

from __future__ import annotations

import pytest

from experiments.soak.over_http import soak


@pytest.mark.slow
def test_a_loaded_server_gives_the_answers_of_an_idle_one_and_keeps_nothing() -> None:
    found = soak(20.0)
    # Memory is flat over minutes, not over the first seconds.
    assert [problem for problem in found["problems"] if not problem.startswith("memory grew")] == []
    assert found["compared"] > 50
