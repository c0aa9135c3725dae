"""Requests through 2 and 4 pipeline stages × other axes: tokens as on one device, with preemption, swapping and prefixes; bad input.

Sampling and extended sampling in three stages are in `test_extended_sampling`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from partinf.buckets import Capacity, with_capacity
from partinf.engine import Engine, FirstComeFirstServed, Policy, SamplingParams
from partinf.engine.estimates import Estimates
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.execution.runner import JaxRunner
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.partition.sharding import device_mesh
from partinf.plans import Bucket, Plan
from partinf.transformer import reference
from partinf.transformer.params import abstract_params, random_params
from partinf.workload import DType

MODEL = ModelConfig("four layers", 4, 64, 64, 8, 2, 8, 250, max_len=64)
LAYOUTS = {
    "2x4": make_layout({"x": "stage", "y": "ffn"}, {"x": "none", "y": "batch"}, {"x": "none", "y": "heads"}),
    "4x2": make_layout({"x": "stage", "y": "embed"}, {"x": "none", "y": "heads"}),
}
PROMPTS = [[3 + n, 5, 7, 9 + n, 11, 13][: 3 + n % 4] for n in range(10)]
PARAMS = [SamplingParams(max_tokens=8 + n % 5, ignore_eos=True) for n in range(10)]
ESTIMATES = Estimates(first_iteration=lambda tokens: 0.01, decode=0.01)
POLICIES: dict[str, Policy] = {
    "fcfs": FirstComeFirstServed(chunk_prefills=True),
    "mlfq": MultiLevelFeedbackQueue(ESTIMATES, 2, pages=Pages(Eviction.REACTIVE, None)),
}


@cache
def make_runner(mesh: str) -> JaxRunner:
    plan = Plan(MODEL, parse_slice("cpu:8", mesh), LAYOUTS[mesh], weights=DType.F32, kv=DType.F32)
    plan = with_capacity(plan, Capacity(max_rows=16 if mesh == "2x4" else 8, max_len=20, prefill_tokens=8, page_size=4, random=False))
    plan = replace(plan, cache=replace(plan.cache, pages_per_shard=14 if plan.num_shards == 1 else 6))
    devices = device_mesh(plan)
    return JaxRunner(plan, random_params(plan, devices, unrolled=False), devices, num_host_pages=60)


@cache
def alone() -> list[tuple[int, ...]]:
    """The answers on one device; the first is compared with the reference."""
    plan = Plan(MODEL, parse_slice("cpu:1"), make_layout({"x": "replica"}, {"x": "none"}), weights=DType.F32, kv=DType.F32)
    plan = with_capacity(plan, Capacity(max_rows=8, max_len=20, prefill_tokens=8, page_size=4, random=False))
    mesh = device_mesh(plan)
    params = random_params(plan, mesh, unrolled=False)
    found = [output.tokens for output in Engine(JaxRunner(plan, params, mesh)).generate(PROMPTS, PARAMS)]
    whole = jax.tree.map(np.asarray, params)
    assert list(found[0]) == reference.greedy(whole, MODEL, PROMPTS[0], PARAMS[0].max_tokens)
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mesh", LAYOUTS)
def test_tokens_are_those_of_one_device(mesh: str, policy: str, nothing_compiles) -> None:
    runner = make_runner(mesh)
    runner.warm_up()
    compiled = runner.num_compiled
    engine = Engine(runner, policy=POLICIES[policy], lag=1, prefix_caching=policy == "fcfs", check_invariants=True)
    got, arriving = {}, list(enumerate(zip(PROMPTS, PARAMS, strict=True)))
    with nothing_compiles():
        while arriving or engine.has_work:
            for number, (prompt, params) in arriving[:2]:
                engine.add_request(prompt, params, str(number))
            del arriving[:2]
            got |= {int(output.id): output.tokens for output in engine.step()}
    assert [got[number] for number in range(len(PROMPTS))] == alone()
    assert engine.metrics.preemptions + engine.metrics.swapped_in_pages > 0
    assert runner.num_compiled == compiled


def test_every_stage_keeps_its_own_part_of_the_pages() -> None:
    runner = make_runner("4x2")
    runner.warm_up()
    (pages,) = runner._host_pages
    runner.reset()
    pages.out(runner._state.kv[0], [0, 1], [4, 5], stage=0)
    alone = pages.num_bytes
    for stage in (1, 2, 3):
        pages.out(runner._state.kv[0], [0, 1], [4, 5], stage=stage)
    assert pages.num_bytes == 4 * alone
    runner.reset()
    assert pages.num_bytes == 0


def test_what_stages_cannot_do_is_reported_before_a_device_is_touched() -> None:
    slice_ = parse_slice("cpu:8", "8")
    with pytest.raises(InvalidInput, match=r"layers N = 4 does not divide over x:8 \(8 ways\); 4 splits into 1, 2, 4"):
        Plan(MODEL, slice_, make_layout({"x": "stage"}, {"x": "none"}))
    with pytest.raises(InvalidInput) as refused:
        make_layout({"x": "stage", "y": "ffn"}, {"x": "batch", "y": "heads"}, {"x": "heads", "y": "heads"}, decode_gather="x")
    assert len(refused.value.offences) == 3
    plan = Plan(MODEL, parse_slice("cpu:8", "2x4"), LAYOUTS["2x4"])
    with pytest.raises(InvalidInput, match="8, 16 decode rows"):
        replace(plan, buckets=(Bucket(8, 2), Bucket(16, 2)))
    apart = replace(plan, buckets=(Bucket(8, 2), Bucket(0, 0, 16, 8)))
    with pytest.raises(InvalidInput, match="no bucket of the plan holds what all others hold"):
        JaxRunner(apart, {})
    with pytest.raises(InvalidInput, match="unrolled=False"):
        abstract_params(plan, device_mesh(plan), unrolled=True)
