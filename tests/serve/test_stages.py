"""A server whose model lies in pipeline stages: clients see nothing of it."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from partinf.engine.batch import ScheduledBatch
from partinf.engine.step import StepOutput
from tests.serve.support import Serving, events, serving, wait_until

SPANS: list[tuple[float, float, set[int]]] = []
"""Of every step: when it was scheduled and committed, and the requests in it."""
TASKS = {"copy: a b c =": " a b c", "repeat: 5 k =": " k k k k k", "sort: d b a c =": " a b c d"}


@pytest.fixture(scope="module")
def staged() -> Iterator[Serving]:
    """The demo model in three stages of two devices each, as `partinf serve` runs it, two sequences to a stage's batch."""
    from partinf import api
    from partinf.buckets import Capacity
    from partinf.engine import Engine
    from partinf.engine.policies.fcfs import FirstComeFirstServed
    from partinf.layout.files import make_layout
    from partinf.workload import DType, Workload

    layout = make_layout({"x": "stage", "y": "ffn"}, {"x": "none", "y": "heads"})
    workload = Workload(6, 16, 16, weights=DType.F32, kv=DType.F32)
    capacity = Capacity(max_rows=6, max_len=32, prefill_tokens=16, random=False)
    model = api.load("demo", api.plan("demo", "cpu:3x2", workload, layout=layout, capacity=capacity))

    def on_step(batch: ScheduledBatch, output: StepOutput, scheduled: float, committed: float) -> None:
        SPANS.append((scheduled, committed, {sequence.request.number for sequence in (*batch.decode, *batch.prefill)}))

    policy, options = FirstComeFirstServed(chunk_prefills=True), {"lag": 1, "prefix_caching": True, "check_invariants": True}
    engine = Engine(model.runner, tokenizer=model.tokenizer, policy=policy, on_step=on_step, **options)
    with serving(engine, model.tokenizer) as found:
        yield found


def body(prompt: str, **more: object) -> dict[str, object]:
    return {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 12} | more


def test_many_clients_at_once(staged: Serving, nothing_compiles) -> None:
    """Streams and whole answers: every one is right, with a batch of other requests on each stage, and nothing is compiled for them."""
    compiled = staged.engine._runner.num_compiled

    def ask(number: int) -> tuple[str, str]:
        prompt, stream = list(TASKS)[number % len(TASKS)], number % 2 == 1
        status, content, _ = staged.post("/v1/completions", body(prompt, stream=stream))
        assert status == 200, content
        return prompt, "".join(event["choices"][0]["text"] for event in (events(content) if stream else [content]))

    with nothing_compiles(), ThreadPoolExecutor(12) as pool:
        for prompt, text in pool.map(ask, range(36)):
            assert text == TASKS[prompt]
    staged.wait_idle()
    assert staged.engine._runner.num_compiled == compiled
    in_flight = [[other for begun, ended, other in SPANS if begun <= scheduled < ended] for scheduled, _, _ in SPANS]
    assert any(len(sets) >= 3 and sum(map(len, sets)) == len(set().union(*sets)) >= 3 for sets in in_flight)


def test_a_client_that_goes_frees_its_pages_on_every_stage(staged: Serving) -> None:
    content = json.dumps(body("repeat: 9 k =", stream=True, ignore_eos=True, max_tokens=26))
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", staged.port, timeout=20)) as connection:
        connection.request("POST", "/v1/completions", content, {"content-type": "application/json"})
        wait_until(lambda: staged.engine.load.num_running)
    staged.wait_idle()
    assert staged.post("/v1/completions", body("copy: a b c ="))[1]["choices"][0]["text"] == TASKS["copy: a b c ="]


def test_what_stages_cannot_do_is_refused(staged: Serving) -> None:
    status, content, _ = staged.post("/v1/completions", body("copy: a b c =", temperature=0.7))
    assert status == 400
    assert "temperature" in content["error"]["message"]
