"""Bad requests are refused with every offence, and disturb no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from partinf.engine import SamplingParams
from partinf.engine.admission import derived_seed
from partinf.foundation.errors import InvalidInput
from tests.engine.support import LETTERS, ROOMY, VOCAB, make_engine, run_all


@pytest.mark.parametrize(
    "values, valid",
    [
        ({"top_p": 2}, "top_p = 2; valid: greater than 0 and at most 1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"temperature": -1}, "temperature = -1; valid: a finite number, at least 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": "warm"}, "temperature = 'warm'"),
        ({"max_tokens": 0}, "max_tokens = 0; valid: a whole number, at least 1"),
        ({"max_tokens": True}, "max_tokens = True"),
        ({"max_tokens": 2.5}, "max_tokens = 2.5"),
        ({"top_k": -1}, "top_k = -1"),
        ({"seed": -1}, "seed = -1; valid: a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"stop": ("a", "")}, "stop = ('a', '')"),
        ({"stop": 3}, "stop = 3"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids = (-1,)"),
        ({"ignore_eos": "no"}, "ignore_eos = 'no'"),
        ({"min_p": 1.5}, "min_p = 1.5; valid: from 0 to 1"),
        ({"presence_penalty": 3}, "presence_penalty = 3; valid: from -2 to 2"),
        ({"frequency_penalty": "x"}, "frequency_penalty = 'x'"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0; valid: from 0.001 to 1000"),
        ({"logit_bias": {1: 101}}, "logit_bias = ((1, 101),); valid: at most 1024 token ids, each once, with values from -100 to 100"),
        ({"logit_bias": {-1: 1}}, "logit_bias = ((-1, 1),)"),
        ({"logit_bias": {"a": 1}}, "logit_bias = (('a', 1),)"),
        ({"logit_bias": [(1, 2), (1, 3)]}, "logit_bias = ((1, 2), (1, 3))"),
        ({"logit_bias": 7}, "logit_bias = 7"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "at most 1024 token ids"),
        ({"n": 0}, "n = 0; valid: a whole number from 1 to 128"),
        ({"n": 129}, "n = 129"),
        ({"top_logprobs": 21}, "top_logprobs = 21; valid: a whole number from 0 to 20"),
        ({"prompt_logprobs": 1}, "prompt_logprobs = 1"),
        ({"timeout": 0}, "timeout = 0; valid: seconds, greater than 0, or None"),
        ({"timeout": float("inf")}, "timeout = inf"),
        ({"temperature": 1e300}, "temperature = 1e+300; valid: a finite number, at least 0 and at most 2**126"),
        ({"temperature": 10**400}, "temperature = 1000000000"),
        ({"temperature": 10**5000}, "temperature = a number of 16610 bits"),
        ({"top_k": -(10**5000)}, "top_k = a number of 16610 bits"),
        ({"top_k": 1.0}, "top_k = 1.0; valid: a whole number"),
        ({"n": 10**5000}, "n = a number of 16610 bits"),
        ({"seed": 2**64}, "seed = 18446744073709551616"),
        ({"priority": 2**64}, "priority = 18446744073709551616"),
        ({"timeout": 10**400}, "timeout = 1000000000"),
        ({"presence_penalty": float("nan")}, "presence_penalty = nan"),
        ({"logit_bias": {1: 10**5000}}, "logit_bias = a tuple of huge numbers"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias = ((1, nan),)"),
        ({"stop_token_ids": (True,)}, "stop_token_ids = (True,)"),
    ],
)
def test_params_out_of_range(values: dict[str, Any], valid: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        SamplingParams(**values)
    assert len(caught.value.offences) == 1
    assert valid in caught.value.offences[0]


def test_numbers_of_numpy_become_pythons() -> None:
    params = SamplingParams(
        np.int64(3), np.float32(0.5), top_k=np.uint8(4), logit_bias={np.int32(5): np.float16(2)}, stop_token_ids=np.arange(2)
    )
    assert params == SamplingParams(3, 0.5, top_k=4, logit_bias={5: 2.0}, stop_token_ids=(0, 1))
    assert {type(params.max_tokens), type(params.top_k), *map(type, params.stop_token_ids)} == {int}
    assert type(params.temperature) is float


def test_all_offences_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        SamplingParams(max_tokens=0, temperature=-1, top_p=2)
    assert len(caught.value.offences) == 3


def test_lists_and_bare_strings_become_tuples() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert hash(params) == hash(SamplingParams(stop=("end",), stop_token_ids=(1, 2)))
    assert SamplingParams(logit_bias={7: 1, 3: -2.5}).logit_bias == ((3, -2.5), (7, 1))  # type: ignore[arg-type]
    assert SamplingParams(logit_bias=[[7, 1], (3, 0)]).logit_bias == ((3, 0), (7, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prompt, params, offences",
    [
        ([], {}, ["the prompt is empty"]),
        ("", {}, ["the prompt is text, but the engine has no tokenizer"]),
        (7, {}, ["the prompt is of type int"]),
        ([1, VOCAB, -1], {}, [f"prompt holds {VOCAB} and 1 more, which is no token id; valid: 0..{VOCAB - 1}"]),
        ([1, "a"], {}, ["prompt holds 'a'"]),
        ([1, True], {}, ["prompt holds True"]),
        ([1] * 64, {}, ["the prompt has 64 tokens, the context 64; the longest prompt is 63"]),
        ([1] * 99, {"stop_token_ids": (VOCAB,), "stop": "x"}, ["the prompt has 99 tokens", "stop_token_ids holds", "stop strings need"]),
    ],
)
def test_refused_with_every_offence(prompt: Any, params: dict[str, Any], offences: list[str]) -> None:
    engine = make_engine()
    engine.add_request([1], SamplingParams(max_tokens=3), "good")
    engine.step()
    with pytest.raises(InvalidInput) as caught:
        engine.add_request(prompt, SamplingParams(**params), "bad")
    assert len(caught.value.offences) == len(offences)
    for found, expected in zip(caught.value.offences, offences, strict=True):
        assert found.startswith(f"request bad: {expected}")
    outputs = run_all(engine)
    assert set(outputs) == {"good"}
    assert outputs["good"].tokens == (2, 3, 4)


def test_text_prompts_are_checked_as_encoded() -> None:
    engine = make_engine(tokenizer=LETTERS)
    with pytest.raises(InvalidInput, match="the prompt is empty"):
        engine.add_request("")
    with pytest.raises(InvalidInput, match="the prompt has 70 tokens, the context 64"):
        engine.add_request("a" * 70)
    assert engine.generate(["abc"], SamplingParams(max_tokens=2))[0].prompt == (0, 1, 2)


def test_generate_with_a_bad_prompt_queues_nothing() -> None:
    engine = make_engine()
    with pytest.raises(InvalidInput) as caught:
        engine.generate([[1], [], [VOCAB]])
    assert len(caught.value.offences) == 2
    assert not engine.has_work


def test_ids_in_flight_are_unique_and_made_up_ones_avoid_them() -> None:
    engine = make_engine()
    engine.add_request([1], SamplingParams(max_tokens=2), "request-1")
    with pytest.raises(InvalidInput, match="in flight already"):
        engine.add_request([1], request_id="request-1")
    made_up = [engine.add_request([1], SamplingParams(max_tokens=2)) for _ in range(3)]
    assert len({*made_up, "request-1"}) == 4
    run_all(engine)
    assert engine.add_request([1], SamplingParams(max_tokens=1), "request-1") == "request-1"


def test_whole_numbers_of_other_libraries_are_tokens() -> None:
    class Index:
        def __index__(self) -> int:
            return 4

    assert make_engine().generate([[Index()]], SamplingParams(max_tokens=1))[0].tokens == (5,)  # type: ignore[list-item]


def test_derived_seeds_differ_and_fit() -> None:
    seeds = {derived_seed(seed, f"request-{number}") for seed in range(3) for number in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_context_is_what_one_shard_can_hold() -> None:
    engine = make_engine(limits=replace(ROOMY, pages_per_shard=3))
    with pytest.raises(InvalidInput, match="the prompt has 12 tokens, the context 12"):
        engine.add_request([1] * 12)
    assert len(engine.generate([[1] * 11], SamplingParams(max_tokens=9))[0].tokens) == 1
