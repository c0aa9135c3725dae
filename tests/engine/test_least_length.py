"""A least length: nothing ends a text before it, and from then on everything does that would have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.engine import Engine, FakeRunner, FinishReason, FirstComeFirstServed, Policy, SamplingParams
from partinf.engine.estimates import Estimates
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.foundation.errors import InvalidInput
from partinf.foundation.limits import MAX_ENDS
from tests.engine.support import ROOMY, all_alone, make_engine
from tests.serve.support import DEMO, LIMITS

ESTIMATES = Estimates(first_iteration=lambda tokens: 1.0, decode=1.0)
TIGHT = replace(ROOMY, pages_per_shard=9, num_host_pages=60, max_len=24)


def queue(eviction: Eviction) -> Policy:
    return MultiLevelFeedbackQueue(ESTIMATES, 4, pages=Pages(eviction, None))


def always(token: int) -> Callable[[Sequence[int]], int]:
    return lambda context: token


def test_stop_tokens_are_not_chosen_before() -> None:
    params = SamplingParams(max_tokens=6, stop_token_ids=(7,), min_tokens=3)
    engine = make_engine(rule=always(7))
    (output,) = engine.generate([[1, 2]], params)
    assert (output.tokens, output.finish_reason) == ((8, 8, 8, 7), FinishReason.STOP)  # the runner takes the next one instead
    (output,) = engine.generate([[1, 2]], replace(params, min_tokens=6))
    assert (output.tokens, output.finish_reason) == ((8,) * 6, FinishReason.LENGTH)
    (output,) = engine.generate([[1, 2]], replace(params, min_tokens=0))
    assert output.tokens == (7,)


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("eviction", [Eviction.RECOMPUTE, Eviction.REACTIVE])
def test_the_length_counts_on_through_preemption_and_swapping(eviction: Eviction, lag: int) -> None:
    engine = Engine(FakeRunner(TIGHT), policy=queue(eviction), lag=lag, clock=lambda: engine.metrics.iterations, check_invariants=True)
    ends = (4, 7, 9, 12, 15, 21, 28)
    params = SamplingParams(max_tokens=15, stop_token_ids=ends, min_tokens=10, n=2)
    prompts = [[number, 7, number, 3, 1] for number in range(5)]
    outputs = engine.generate(prompts, params)
    assert engine.metrics.preemptions + engine.metrics.swap_outs > 4
    assert not any(token in ends for output in outputs for token in output.tokens[:10])
    want = [output for prompt in prompts for output in all_alone(ROOMY, prompt, params, "x")]
    assert [(output.tokens, output.finish_reason) for output in outputs] == [(output.tokens, output.finish_reason) for output in want]
    assert len({output.finish_reason for output in outputs}) == 2


def test_ends_of_sequence_and_stop_strings_wait_as_well() -> None:
    tokenizer = load_tokenizer(DEMO)
    (eos,) = tokenizer.eos_ids
    engine = Engine(FakeRunner(LIMITS, rule=always(eos)), tokenizer=tokenizer, policy=FirstComeFirstServed())
    (output,) = engine.generate([[5]], SamplingParams(max_tokens=5, min_tokens=2))
    assert (output.tokens[-1], len(output.tokens), output.finish_reason) == (eos, 3, FinishReason.STOP)

    (word,) = tokenizer.encode(" a", add_bos=False)
    engine = Engine(FakeRunner(LIMITS, rule=always(word)), tokenizer=tokenizer)
    ask = SamplingParams(max_tokens=6, stop=("a a",), ignore_eos=True)
    assert engine.generate([[5]], ask)[0].text == " "
    (output,) = engine.generate([[5]], replace(ask, min_tokens=3))
    assert (output.text, len(output.tokens)) == (" a a ", 4)  # the last of the three may begin the string that ends the text
    assert engine.generate([[5]], replace(ask, min_tokens=6))[0].text == " a" * 6


def test_what_cannot_be_held_back_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"min_tokens = 4; valid: a whole number from 0 to max_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)
    engine = make_engine(limits=replace(ROOMY, vocab_size=500))
    many = SamplingParams(stop_token_ids=tuple(range(MAX_ENDS + 1)))
    with pytest.raises(InvalidInput, match=f"{MAX_ENDS + 1} tokens that end the text; at most"):
        engine.generate([[1]], replace(many, min_tokens=1))
    assert engine.generate([[1]], many)
    plain = Engine(FakeRunner(replace(ROOMY, extended=False)))
    with pytest.raises(InvalidInput, match="min_tokens = 2, but the steps cannot do that"):
        plain.generate([[1]], SamplingParams(min_tokens=2, stop_token_ids=(5,)))
    assert len(plain.generate([[1]], SamplingParams(min_tokens=2, max_tokens=3))[0].tokens) == 3  # nothing could end it before


def test_special_tokens_stand_in_the_text_by_name_where_they_are_wanted() -> None:
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer.bos_id is not None
    engine = Engine(FakeRunner(LIMITS, rule=always(tokenizer.bos_id)), tokenizer=tokenizer)
    ask = SamplingParams(max_tokens=2)
    assert engine.generate([[5]], ask)[0].text == ""
    assert engine.generate([[5]], replace(ask, skip_special_tokens=False))[0].text == "<s><s>"
    assert tokenizer.decode([1, 5, 1], special=True) == "<s>" + tokenizer.decode([5]) + "<s>"
