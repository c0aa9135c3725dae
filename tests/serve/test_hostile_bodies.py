"""Bodies at the ends of ranges, and prompts that are far too large: nothing breaks, and other clients do not notice."""

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
    """Next to a neighbour, which gets what it gets alone."""
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


@pytest.mark.parametrize(
    "values",
    [
        b'"prompt": [' + b"[]," * 1_000_000 + b"[]]",
        b'"prompt": "a", "x": [' + b"{}," * 1_000_000 + b"{}]",
        b'"messages": [' + b'{"role": "user", "content": ""},' * 100_000 + b"{}]",
        b'"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": [' + b"[]," * 1_000_000 + b"[]]}",
        b'"prompt": "a", "stop": [' + b'"",' * 2_000_000 + b'""]',
        b'"prompt": "a", "logit_bias": {' + b",".join(b'"%d":1' % number for number in range(400_000)) + b"}",
        b'"prompt": [' + b"1," * 2_000_000 + b"1]",
    ],
    ids=["lists", "objects", "messages", "variables", "stops", "keys", "numbers"],
)
def test_bodies_of_very_many_values_are_not_looked_at(shared: Serving, values: bytes) -> None:
    """Each value takes many times its bytes, and every list and object time of the interpreter, which is everybody's."""
    started = time.monotonic()
    path = "/v1/chat/completions" if b'"messages"' in values else "/v1/completions"
    status, content, _ = shared.post(path, b'{"model": "demo", ' + values + b"}")
    assert (status, content["error"]["code"]) == (400, "too_large")
    assert "lists and objects" in content["error"]["message"]
    assert time.monotonic() - started < 3  # most of it are the bytes on their way


def test_a_text_may_hold_any_number_of_brackets(shared: Serving) -> None:
    for text in ('[{,"\\' * 200_000, "[" * 2_000_000, '"' * 1_000_000, "\\" * 1_000_001 + "[" * 100_000):
        status, content, _ = shared.post("/v1/completions", {"model": "demo", "prompt": "copy: a =", "user": text, "max_tokens": 1})
        assert status == 200, content


@pytest.mark.parametrize("value", [2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**300])
def test_a_top_k_beyond_the_vocabulary_is_all_of_it_or_refused(demo: Serving, value: int) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        guards = [pool.submit(demo.post, "/v1/completions", GUARD) for _ in range(4)]
        status, content, _ = demo.post("/v1/completions", {"model": "demo", "prompt": "sort: b a =", "temperature": 1, "top_k": value})
        assert status == 200 or (status, content["error"]["param"]) in ((400, "top_k"), (400, None)), content
        assert {one.result()[1]["choices"][0]["text"] for one in guards} == {WANTED}


def test_prompts_that_are_far_too_large_block_no_other_client(root: Path) -> None:
    """A tokenizer.json takes a second for a million characters; these are refused before."""
    tokenizer = load_tokenizer(root / "tests/fixtures/tokenizer_byte_level")
    limits = replace(LIMITS, vocab_size=tokenizer.vocab_size)
    large = json.dumps({"model": "demo", "prompt": "x" * 7_800_000}).encode()
    with serving(fake_engine(Slow(limits), tokenizer=tokenizer), tokenizer) as found, concurrent.futures.ThreadPoolExecutor() as pool:
        pending = [pool.submit(found.post, "/v1/completions", large) for _ in range(4)]
        slowest = 0.0
        while not all(one.done() for one in pending):
            started = time.monotonic()
            assert found.get("/health")[0] == 200
            slowest = max(slowest, time.monotonic() - started)
        for one in pending:
            status, content, _ = one.result()
            assert (status, content["error"]["param"], content["error"]["code"]) == (400, "prompt", "context_length_exceeded")
    assert slowest < 2  # of some twenty that encoding them would take
