"""More sequences at once than the pages hold at full length: every answer is that of its request alone."""

from __future__ import annotations

import random
from functools import cache

import pytest

from partinf import api
from partinf.buckets import Capacity
from partinf.engine import Engine, SamplingParams
from partinf.engine.policies.ranked import Eviction
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.measure.estimates import measured_estimates
from partinf.workload import DType, Workload

MAX_LEN, PAGE = 64, 8


@cache
def load(full: int, rows: int) -> api.Model:
    """The demo model on pages of so many sequences at full length, of which so many run together and four times as many may hold pages.

    Where many run together a step takes as many more prompt tokens, so that pages fill faster than sequences end.
    """
    capacity = Capacity(
        rows,
        MAX_LEN,
        prefill_tokens=max(32, full * PAGE),
        page_size=PAGE,
        max_residents=4 * rows,
        kv_pages=full * MAX_LEN // PAGE,
        constrained=False,
    )
    workload = Workload(rows, MAX_LEN // 2, MAX_LEN // 2, weights=DType.F32, kv=DType.F32)
    return api.load("demo", api.plan("demo", "cpu:1", workload, capacity=capacity), num_host_pages=full * 4 * MAX_LEN // PAGE)


def check(count: int, full: int, rows: int) -> None:
    """Requests of mixed lengths, every other one sampled, under policies that compute again and that swap what they took pages from."""
    model, rng = load(full, rows), random.Random(0)
    lens = [(rng.randint(2, MAX_LEN // 2), rng.randint(2, MAX_LEN // 2 - 1)) for _ in range(count)]
    prompts = [rng.choices(range(4, 96), k=prompt) for prompt, _ in lens]
    params = [SamplingParams(output, temperature=float(i % 2), seed=i, ignore_eos=True) for i, (_, output) in enumerate(lens)]
    alone = Engine(model.runner)
    expected = [alone.generate([prompt], [how])[0].tokens for prompt, how in zip(prompts, params, strict=True)]
    estimates = measured_estimates(model.runner, model.plan.buckets, repeats=1)
    for name, eviction in (("fcfs-chunked", Eviction.RECOMPUTE), ("mlfq", Eviction.REACTIVE)):
        policy = make_policy(name, PolicyOptions(rows, eviction=eviction), estimates)
        engine = Engine(model.runner, policy=policy, check_invariants=True)
        assert [output.tokens for output in engine.generate(prompts, params)] == expected, name
        summary = engine.metrics.summary()
        taken = summary.swapped_out_pages if eviction is Eviction.REACTIVE else summary.preemptions
        assert taken > 0, f"{name} preempted no sequence"


def test_answers_are_those_of_requests_alone() -> None:
    check(24, full=3, rows=12)


@pytest.mark.slow
def test_two_hundred_requests_on_pages_for_twenty() -> None:
    check(200, full=20, rows=64)


def test_pages_for_one_sequence_are_enough() -> None:
    """As in int8 on one v5e at the defaults: the longest context takes all pages."""
    model = load(3, 12)
    limits = model.runner.limits
    assert limits.pages_per_shard == 3 * MAX_LEN // PAGE
    one = api.plan(
        "demo",
        "cpu:1",
        Workload(12, 32, 32, weights=DType.F32, kv=DType.F32),
        capacity=Capacity(12, 0, prefill_tokens=32, page_size=PAGE, kv_pages=limits.pages_per_shard // 3),
    )
    assert one.max_len == MAX_LEN  # of the model's 128
    assert one.cache.num_slots == 12
