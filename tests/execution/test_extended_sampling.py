"""Penalties, biases, alternatives, log-probabilities of prompts and samples on the real model, against the reference and numpy.

One program does everything: decode lanes, prompts and chunks. Pages are short, so requests are preempted, swapped and find each other's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partinf.buckets import Capacity, with_capacity
from partinf.checkpoint.hf import load_hf
from partinf.engine import Engine, FinishReason, FirstComeFirstServed, Orca, Policy, RequestOutput, SamplingParams
from partinf.engine.estimates import Estimates
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.execution.runner import JaxRunner
from partinf.foundation import resources
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.partition.sharding import device_mesh
from partinf.plans import Plan
from partinf.transformer import reference
from partinf.transformer.params import abstract_params
from partinf.transformer.slots import adjust_logits_plain
from partinf.workload import DType

LAYOUTS = {
    "cpu:2x2x2": make_layout(
        {"x": "replica", "y": "embed", "z": "ffn"}, {"x": "batch", "y": "heads", "z": "sequence"}, dict.fromkeys("xyz", "heads")
    ),
    "cpu:1": make_layout({"x": "replica"}, {"x": "none"}),
    "cpu:3x2": make_layout({"x": "stage", "y": "ffn"}, {"x": "none", "y": "heads"}),
}
TOLERANCE = 1e-4  # of float32 logits, as in the harness
PROMPTS = [[3, 5, 7, 5, 9, 11, 13, 7, 2, 3 + n] for n in range(3)] + [[4, 4]]
PARAMS = [
    SamplingParams(max_tokens=14, presence_penalty=2.0, frequency_penalty=1.5, logit_bias={17: 4.0, 2: -100.0}, top_logprobs=4),
    SamplingParams(max_tokens=14, repetition_penalty=2.5, prompt_logprobs=True, n=2),
    SamplingParams(max_tokens=14, temperature=1.1, top_k=40, min_p=0.02, frequency_penalty=0.7, n=3, seed=4, prompt_logprobs=True),
    SamplingParams(max_tokens=14, top_logprobs=20),
]
PARAMS = [replace(params, ignore_eos=True, logprobs=True) for params in PARAMS]


ESTIMATES = Estimates(first_iteration=lambda tokens: 1e-4, decode=1e-4)
POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": lambda: FirstComeFirstServed(chunk_prefills=True),
    "orca": lambda: Orca(4),
    "mlfq": lambda: MultiLevelFeedbackQueue(ESTIMATES, 5, pages=Pages(Eviction.REACTIVE, None)),
}


@cache
def make_runner(slice_name: str) -> JaxRunner:
    plan = Plan(load_model_config("demo"), parse_slice(slice_name), LAYOUTS[slice_name], weights=DType.F32, kv=DType.F32)
    plan = with_capacity(plan, Capacity(max_rows=8, max_len=28, prefill_tokens=16, page_size=4, extended=True, constrained=True))
    plan = replace(plan, buckets=plan.buckets[-1:], cache=replace(plan.cache, pages_per_shard=16 // plan.num_shards))
    mesh = device_mesh(plan)
    runner = JaxRunner(plan, load_hf(resources.find("models", "demo"), plan.model, abstract_params(plan, mesh, False)), mesh, 40)
    runner.warm_up()
    return runner


def answers(slice_name: str, policy: Policy, lag: int, caching: bool) -> tuple[list[RequestOutput], Engine]:
    runner = make_runner(slice_name)
    compiled = runner.num_compiled
    engine = Engine(runner, policy=policy, lag=lag, prefix_caching=caching, check_invariants=True)
    outputs = engine.generate(PROMPTS, PARAMS)
    assert runner.num_compiled == compiled
    return outputs, engine


@cache
def alone(slice_name: str) -> list[RequestOutput]:
    """The answers to requests that come one by one."""
    engine = Engine(make_runner(slice_name))
    return [output for prompt, params in zip(PROMPTS, PARAMS, strict=True) for output in engine.generate([prompt], params)]


@pytest.mark.parametrize("slice_name", LAYOUTS)
def test_equal_to_the_reference_and_numpy(slice_name: str) -> None:
    runner, outputs = make_runner(slice_name), alone(slice_name)
    rows = [[*output.prompt, *output.tokens] for output in outputs]
    padded = jnp.asarray([row + [0] * (28 - len(row)) for row in rows])
    found = jax.jit(reference.forward, static_argnums=1)(jax.tree.map(np.asarray, runner.params), runner.plan.model, padded)
    logprobs = np.asarray(jax.nn.log_softmax(found))
    for output, row, raw, logp in zip(outputs, rows, np.asarray(found), logprobs, strict=True):
        params = PARAMS[PROMPTS.index(list(output.prompt))]
        penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
        for index, token in enumerate(output.tokens):
            at = len(output.prompt) - 1 + index
            np.testing.assert_allclose(output.logprobs[index], logp[at, token], atol=TOLERANCE)
            adjusted = adjust_logits_plain(raw[at], output.prompt, output.tokens[:index], dict(params.logit_bias), penalties)
            if not params.temperature:
                assert adjusted.max() - adjusted[token] < TOLERANCE
            if params.top_logprobs:
                tokens, values = zip(*output.top_logprobs[index], strict=True)
                np.testing.assert_allclose(values, -np.sort(-logp[at])[: params.top_logprobs], atol=TOLERANCE)
                np.testing.assert_allclose(logp[at, list(tokens)], values, atol=TOLERANCE)
        if params.prompt_logprobs:
            want = logp[np.arange(len(output.prompt) - 1), row[1 : len(output.prompt)]]
            assert output.prompt_logprobs[0] is None
            np.testing.assert_allclose(output.prompt_logprobs[1:], want, atol=TOLERANCE)
            assert output.prompt_top_logprobs[0] is None
            tops, values = map(list, zip(*output.prompt_top_logprobs[1:], strict=True))
            places = logp[: len(output.prompt) - 1]
            np.testing.assert_allclose(values, places.max(axis=-1), atol=TOLERANCE)
            np.testing.assert_allclose(np.take_along_axis(places, np.array(tops)[:, None], axis=-1)[:, 0], values, atol=TOLERANCE)
    plain = Engine(runner).generate(PROMPTS[:2], SamplingParams(max_tokens=14, ignore_eos=True))
    assert all(one.tokens != output.tokens for one, output in zip(plain, outputs, strict=False))  # penalties do something


@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
@pytest.mark.parametrize("slice_name", LAYOUTS)
def test_tokens_depend_on_nothing_else(slice_name: str, policy: str) -> None:
    """Neither on the batch, preemption, swapping, shared and cached pages, steps ahead, nor the mesh."""
    outputs, engine = answers(slice_name, POLICIES[policy](), lag=1, caching=policy == "fcfs")
    want = alone("cpu:1")
    assert [(output.tokens, output.sample) for output in outputs] == [(output.tokens, output.sample) for output in want]
    for output, one in zip(outputs, want, strict=True):
        np.testing.assert_allclose(output.logprobs, one.logprobs, atol=TOLERANCE)
        if one.prompt_logprobs is not None:
            np.testing.assert_allclose(output.prompt_logprobs[1:], one.prompt_logprobs[1:], atol=TOLERANCE)
    assert engine.metrics.cached_tokens > 0
    assert engine.metrics.preemptions + engine.metrics.swap_outs > 0
    assert len({output.tokens for output in outputs if output.prompt == tuple(PROMPTS[2])}) == 3


SHARED = [3, 5, 7, 5, 9, 11, 13, 7, 2, 6]
BEGINNINGS = [SHARED[:9], SHARED, [*SHARED, 4, 8, 15], [*SHARED[:8], 16, 23], SHARED[:4], [42, 4, 2]]
SHORT = [replace(params, max_tokens=6, n=min(params.n, 2)) for params in PARAMS]


@cache
def answer_alone(beginning: int, how: int) -> list[tuple[int, ...]]:
    engine = Engine(make_runner("cpu:1"))
    return [output.tokens for output in engine.generate([BEGINNINGS[beginning]], SHORT[how])]


@dataclass(frozen=True)
class Arrival:
    """A request that comes before iteration `at` and may be cancelled some iterations later."""

    beginning: int
    how: int
    at: int
    cancel_after: int | None


ARRIVALS = st.builds(Arrival, st.integers(0, 5), st.integers(0, 3), st.integers(0, 8), st.none() | st.none() | st.integers(0, 6))


@settings(max_examples=25)
@given(
    arrivals=st.lists(ARRIVALS, min_size=2, max_size=7), policy=st.sampled_from([*POLICIES]), lag=st.integers(0, 1), caching=st.booleans()
)
def test_everyone_is_answered_as_if_alone(arrivals: list[Arrival], policy: str, lag: int, caching: bool) -> None:
    """Prompts that begin alike, whole pages or not, come and go; pages are cached, shared, swapped and taken away."""
    _check_that_everyone_is_answered("cpu:1", arrivals, policy, lag, caching)


@settings(max_examples=15)
@given(
    arrivals=st.lists(ARRIVALS, min_size=2, max_size=7), policy=st.sampled_from([*POLICIES]), lag=st.integers(0, 2), caching=st.booleans()
)
def test_everyone_is_answered_by_three_stages(arrivals: list[Arrival], policy: str, lag: int, caching: bool) -> None:
    """The same in a pipeline, where every stage keeps, swaps and shares its own part of the pages, one step behind the one before."""
    _check_that_everyone_is_answered("cpu:3x2", arrivals, policy, lag, caching)


def _check_that_everyone_is_answered(slice_name: str, arrivals: list[Arrival], policy: str, lag: int, caching: bool) -> None:
    engine = Engine(make_runner(slice_name), policy=POLICIES[policy](), lag=lag, prefix_caching=caching, check_invariants=True)
    outputs: dict[str, dict[int, RequestOutput]] = {str(number): {} for number in range(len(arrivals))}
    iteration = 0
    while iteration < 20 or engine.has_work:
        for number, arrival in enumerate(arrivals):
            if arrival.at == iteration:
                engine.add_request(BEGINNINGS[arrival.beginning], SHORT[arrival.how], str(number))
            if arrival.cancel_after is not None and arrival.at + arrival.cancel_after == iteration:
                engine.cancel(str(number))
        for output in engine.step():
            assert outputs[output.id].setdefault(output.sample, output) is output
        iteration += 1
        assert iteration < 500
    for number, arrival in enumerate(arrivals):
        want = answer_alone(arrival.beginning, arrival.how)
        assert len(outputs[str(number)]) == len(want)
        for sample, output in outputs[str(number)].items():
            assert output.tokens == want[sample][: len(output.tokens)]
            assert (output.finish_reason is FinishReason.CANCELLED) or len(output.tokens) == 6
    assert engine._scheduler.pool.num_free_pages == engine.limits.num_shards * engine.limits.pages_per_shard
