"""Bodies at the ends of ranges, and prompts that are far too large: nothing breaks, and nobody else notices."""

from __future__ import annotations

import concurrent.futures
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.hostile_inputs.bodies import bodies
from experiments.hostile_inputs.http import GUARD, WANTED, measure
from partinf.checkpoint.tokenizer import load_tokenizer
from tests.serve.support import LIMITS, Serving, Slow, fake_engine, serving


def test_random_bodies_at_the_ends_of_ranges(demo: Serving) -> None:
    """Beside a neighbour, who gets what it gets alone."""
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        hostile = [pool.submit(demo.post, *one) for one in bodies(seed=1, count=150)]
        guards = [pool.submit(demo.post, "/v1/completions", GUARD) for _ in range(20)]
        found = [one.result() for one in hostile]
    assert {status for status, _, _ in found} == {200, 400}
    assert not any(isinstance(content, str) and "server_error" in content for _, content, _ in found)
    assert {(status, content["choices"][0]["text"]) for status, content, _ in (one.result() for one in guards)} == {(200, WANTED)}
    demo.wait_idle()


@pytest.mark.slow
def test_very_many_random_bodies() -> None:
    found = measure(2500, seed=2)
    assert (found["failures"], found["guards_harmed"], found["alive_at_the_end"]) == (0, 0, True), found
    assert max(found["slowest_answer_seconds"], found["slowest_guard_seconds"]) < 30
    assert found["most_above_idle_mib"] < 1024


def test_prompts_that_are_far_too_large_silence_nobody(root: Path) -> None:
    """A tokenizer.json takes a second for a million characters; these are refused before."""
    tokenizer = load_tokenizer(root / "tests/fixtures/tokenizer_byte_level")
    limits = replace(LIMITS, vocab_size=tokenizer.vocab_size)
    large = json.dumps({"model": "demo", "prompt": "x" * 7_800_000}).encode()
    with serving(fake_engine(Slow(limits), tokenizer=tokenizer), tokenizer) as found, concurrent.futures.ThreadPoolExecutor() as pool:
        asked = [pool.submit(found.post, "/v1/completions", large) for _ in range(4)]
        slowest = 0.0
        while not all(one.done() for one in asked):
            started = time.monotonic()
            assert found.get("/health")[0] == 200
            slowest = max(slowest, time.monotonic() - started)
        for one in asked:
            status, content, _ = one.result()
            assert (status, content["error"]["param"], content["error"]["code"]) == (400, "prompt", "context_length_exceeded")
    assert slowest < 2  # of some twenty that encoding them would take
