"""Samples of one prompt, penalties, alternatives and log-probabilities of prompts, on a runner whose tokens show every mistake."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from partinf.engine import Engine, FakeRunner, FinishReason, FirstComeFirstServed, Orca, Policy, RequestLevel, SamplingParams, TokenEvent
from partinf.engine.estimates import Estimates
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.foundation.errors import InvalidInput
from tests.engine.support import ROOMY, all_alone, make_engine

ADJUSTED = SamplingParams(max_tokens=9, presence_penalty=1.0, frequency_penalty=2.0, repetition_penalty=3.0, logit_bias={4: 2.0})
SAMPLED = SamplingParams(max_tokens=6, temperature=1.0, n=3, seed=5)
ESTIMATES = Estimates(first_iteration=lambda tokens: 1.0, decode=1.0)
TIGHT = replace(ROOMY, pages_per_shard=9, num_host_pages=60, max_len=24)


def queue(eviction: Eviction) -> Callable[[], Policy]:
    return lambda: MultiLevelFeedbackQueue(ESTIMATES, 4, pages=Pages(eviction, None))


POLICIES = {"fcfs": FirstComeFirstServed, "recompute": queue(Eviction.RECOMPUTE), "swap": queue(Eviction.REACTIVE)}


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("policy", POLICIES)
def test_counts_survive_preemption_and_swapping(policy: str, lag: int) -> None:
    engine = Engine(FakeRunner(TIGHT), policy=POLICIES[policy](), lag=lag, clock=lambda: engine.metrics.iterations, check_invariants=True)
    prompts = [[number, 7, number, 3, 1] for number in range(5)]
    outputs = engine.generate(prompts, replace(ADJUSTED, n=2))
    want = [output.tokens for prompt in prompts for output in all_alone(ROOMY, prompt, replace(ADJUSTED, n=2), "x")]
    assert [output.tokens for output in outputs] == want
    assert engine.metrics.preemptions + engine.metrics.swap_outs > 4
    starts = [start for step in engine._runner.steps for start in step.starts]
    assert len({start.slot for start in starts if start.generated}) > 1  # in the middle of an answer, and not where it began
    assert len(set(want)) > 3


def test_samples_share_the_pages_of_their_prompt() -> None:
    engine = make_engine(rule=None)
    prompt = list(range(1, 11))  # two full pages and a half
    outputs = engine.generate([prompt, [5, 6]], SAMPLED)
    assert [(output.id, output.sample) for output in outputs] == [(f"request-{n}", sample) for n in (0, 1) for sample in range(3)]
    want = [output.tokens for one in (prompt, [5, 6]) for output in all_alone(ROOMY, one, SAMPLED, "x")]
    assert [output.tokens for output in outputs] == want
    assert len(set(want)) == 6
    steps = engine._runner.steps
    long = sorted((chunk.start, len(chunk.tokens)) for step in steps for chunk in step.prefill if chunk.end == 10)
    assert long == [(0, 10), (8, 2), (8, 2)]
    tables = {row.tables[0].ids[:2] for step in steps for row in step.decode if row.position > 10}
    assert len(tables) == 1  # all three read the same two pages
    assert engine.metrics.cached_tokens == 16


@pytest.mark.parametrize("options", [{"num_shards": 2}, {"chunks": False}, {"pages_per_shard": 5}, {"num_slots": 1}], ids=str)
@pytest.mark.parametrize("policy", [FirstComeFirstServed(), Orca(), RequestLevel(2)], ids=["fcfs", "orca", "request-level"])
def test_samples_are_answered_wherever_their_pages_are(options: dict[str, Any], policy: Policy) -> None:
    limits = replace(ROOMY, max_len=20, **options)
    engine = Engine(FakeRunner(limits), policy=policy, check_invariants=True)
    prompt = list(range(1, 11))
    params = [SAMPLED, SamplingParams(max_tokens=3), SAMPLED]
    outputs = engine.generate([prompt, [3], prompt], params)
    want = [output.tokens for one, how in zip([prompt, [3], prompt], params, strict=True) for output in all_alone(ROOMY, one, how, "x")]
    assert [output.tokens for output in outputs] == want


def test_a_stream_of_samples_ends_when_all_have_ended() -> None:
    engine = make_engine(rule=None)
    events = list(engine.stream([1, 2, 3], SAMPLED))
    assert sum(event.finish_reason is FinishReason.LENGTH for event in events) == 3
    found = [tuple(event.token for event in events if event.sample == sample) for sample in range(3)]
    assert found == [output.tokens for output in all_alone(ROOMY, [1, 2, 3], SAMPLED, "x")]

    async def collect() -> list[TokenEvent]:
        return [event async for event in engine.stream([1, 2, 3], SAMPLED)]

    assert sorted(asyncio.run(collect()), key=lambda e: (e.sample, e.index)) == sorted(
        (replace(event, request_id="request-1") for event in events), key=lambda e: (e.sample, e.index)
    )


def test_cancel_and_a_failing_callback_end_all_samples() -> None:
    for policy in (None, RequestLevel(4)):
        engine = make_engine(rule=None, policy=policy)
        engine.add_request([1, 2], SAMPLED, "gone")
        engine.add_request([3], SamplingParams(max_tokens=8), "stays")
        for _ in range(3):
            engine.step()
        assert engine.cancel("gone")
        assert not engine.cancel("gone")
        engine.add_request([1, 2], SAMPLED, "gone")  # the id is free again
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        cancelled = [output.sample for output in outputs if output.finish_reason is FinishReason.CANCELLED]
        assert sorted(cancelled) == [0, 1, 2]
        assert len(outputs) == 7

    def fails(event: TokenEvent) -> None:
        if event.sample == 1:
            raise ValueError("the callback's own fault")

    engine = make_engine(rule=None)
    outputs = engine.generate([[1, 2]], SAMPLED, on_token=fails)
    assert {output.finish_reason for output in outputs} == {FinishReason.FAILED}
    assert all(isinstance(output.error, ValueError) for output in outputs)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("policy", [FirstComeFirstServed(chunk_prefills=True), RequestLevel(3, shortest_prefill=True)], ids=["cut", "ft"])
def test_log_probabilities_of_prompts_do_not_depend_on_how_they_are_run(policy: Policy, caching: bool) -> None:
    limits = replace(ROOMY, max_prefill_tokens=7)
    params = SamplingParams(max_tokens=3, prompt_logprobs=True, n=2)
    prompts = [list(range(1, 14)), [4], [5, 6], list(range(1, 14))]
    engine = Engine(FakeRunner(limits), policy=policy, prefix_caching=caching, check_invariants=True)
    outputs = engine.generate(prompts, params)
    for index, prompt in enumerate(prompts):
        want = all_alone(ROOMY, prompt, params, "x")
        assert [output.tokens for output in outputs[2 * index : 2 * index + 2]] == [output.tokens for output in want]
        for output in outputs[2 * index : 2 * index + 2]:
            assert output.prompt_logprobs == want[0].prompt_logprobs
            assert output.prompt_top_logprobs == want[0].prompt_top_logprobs
            assert [top is None for top in output.prompt_top_logprobs or ()] == [True] + [False] * (len(prompt) - 1)
            assert output.prompt_logprobs is not None
            assert output.prompt_logprobs[0] is None
            assert None not in output.prompt_logprobs[1:]


def test_alternatives_come_with_tokens_and_events() -> None:
    engine, events = make_engine(), []
    (output,) = engine.generate([[1]], SamplingParams(max_tokens=2, top_logprobs=2), on_token=events.append)
    assert output.top_logprobs == (((2, -2.0), (3, -3.0)), ((3, -3.0), (4, -4.0)))
    assert [event.top_logprobs for event in events] == list(output.top_logprobs)
    (plain,) = engine.generate([[1]], SamplingParams(max_tokens=2))
    assert plain.top_logprobs is None
    assert plain.prompt_logprobs is None


def test_what_the_steps_cannot_do_is_refused() -> None:
    engine = make_engine(limits=replace(ROOMY, random=False, extended=False))
    with pytest.raises(InvalidInput) as caught:
        engine.add_request([1], replace(ADJUSTED, temperature=0.5, top_logprobs=1, prompt_logprobs=True))
    assert len(caught.value.offences) == 7
    assert "temperature = 0.5, but the steps take the most likely token; plan with Capacity(random=True)" in caught.value.offences[0]
    assert "presence_penalty = 1.0, but the steps cannot do that; plan with Capacity(extended=True)" in caught.value.offences[1]
    assert engine.generate([[1]], SamplingParams(max_tokens=1, n=2))[1].tokens == (2,)
    with pytest.raises(InvalidInput, match="logit_bias holds 99, which is no token id"):
        make_engine().add_request([1], SamplingParams(logit_bias={99: 1.0}))
