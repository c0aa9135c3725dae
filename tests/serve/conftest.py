"""The demo model behind a server, loaded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from partinf.serve.chat_template import load_chat_template
from tests.serve.support import DEMO, LIMITS, Serving, fake_serving, serving


@pytest.fixture(scope="session")
def demo() -> Iterator[Serving]:
    """The demo model, as `partinf serve` runs it."""
    from partinf import api
    from partinf.buckets import Capacity
    from partinf.engine import Engine
    from partinf.engine.policies.fcfs import FirstComeFirstServed
    from partinf.workload import DType, Workload

    workload = Workload(16, 64, 64, weights=DType.F32, kv=DType.F32)
    capacity = Capacity(max_rows=16, max_len=LIMITS.max_len, prefill_tokens=128, extended=True, constrained=True)
    model = api.load("demo", api.plan("demo", "cpu:1", workload, capacity=capacity))
    policy = FirstComeFirstServed(chunk_prefills=True)
    engine = Engine(model.runner, tokenizer=model.tokenizer, policy=policy, lag=1, check_invariants=True, num_mask_threads=2)
    with serving(engine, model.tokenizer, load_chat_template(DEMO)) as found:
        yield found


@pytest.fixture
def fake() -> Iterator[Serving]:
    """A server on the fake runner, for what needs no model."""
    with fake_serving() as found:
        yield found


@pytest.fixture(scope="session")
def shared() -> Iterator[Serving]:
    """The same for tests that leave it as it was."""
    with fake_serving() as found:
        yield found
