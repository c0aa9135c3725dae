"""Text as it streams: characters in halves, stop strings across tokens, and streams that add up to the answer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partinf.engine import FinishReason, SamplingParams, TokenEvent
from partinf.engine.detokenize import StopStrings
from tests.engine.support import LETTERS, Pieces, make_engine


def read(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    stops = StopStrings(stop)
    text = "".join(stops.push(piece) for piece in pieces)
    return text + stops.finish(), stops.found


@pytest.mark.parametrize(
    "pieces, stop, text, found",
    [
        (["ab", "cd"], ["bc"], "a", True),
        (["a", "b", "c"], ["abcd"], "abc", False),
        (["aab"], ["ab"], "a", True),
        (["a", "a", "b"], ["ab"], "a", True),
        (["xab", "ac"], ["abac"], "x", True),
        (["abababac"], ["abac"], "abab", True),
        (["abcd"], ["abcd", "c"], "ab", True),  # "c" is complete first
        (["abc"], ["abc", "c"], "", True),  # both end here: the longer one
        (["abc"], [], "abc", False),
        (["x", "", "y"], ["xy"], "", True),
    ],
)
def test_stop_strings(pieces: list[str], stop: list[str], text: str, found: bool) -> None:
    assert read(pieces, stop) == (text, found)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(0, 2**32))
def test_stop_strings_do_not_depend_on_the_cuts(text: str, stop: list[str], seed: int) -> None:
    rng, pieces, rest = random.Random(seed), [], text
    while rest:
        cut = rng.randint(0, len(rest))
        pieces.append(rest[:cut])
        rest = rest[cut:]
    given_out, found = read(pieces, stop)
    assert (given_out, found) == read(list(text), stop)
    ends = [(text.index(string) + len(string), text.index(string)) for string in stop if string in text]
    assert given_out == (text[: min(ends)[1]] if ends else text)


def test_no_part_of_a_stop_string_is_streamed() -> None:
    engine = make_engine(tokenizer=LETTERS)
    events = list(engine.stream("a", SamplingParams(max_tokens=20, stop=("efgh", "fgz"))))
    assert [event.text for event in events] == ["b", "c", "d", "", "", "", ""]
    assert [event.finish_reason for event in events] == [None] * 6 + [FinishReason.STOP]
    (output,) = engine.generate(["a"], SamplingParams(max_tokens=20, stop=("efgh", "fgz")))
    assert (output.text, output.tokens) == ("bcd", (1, 2, 3, 4, 5, 6, 7))


def test_what_was_held_back_comes_at_the_end() -> None:
    engine = make_engine(tokenizer=LETTERS)
    events = list(engine.stream("a", SamplingParams(max_tokens=5, stop=("efgh",))))
    assert [event.text for event in events] == ["b", "c", "d", "", "ef"]
    events = list(engine.stream("a", SamplingParams(max_tokens=6, stop=("ex",), stop_token_ids=(5,))))
    assert [event.text for event in events] == ["b", "c", "d", "", "e"]


def test_half_characters() -> None:
    engine = make_engine(tokenizer=Pieces([".", "a", "~", "~", "b", "~"]))
    events = list(engine.stream([0], SamplingParams(max_tokens=5)))
    assert [event.text for event in events] == ["a", "", "≈", "b", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("seed", range(4))
def test_streaming_equals_generate(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [rng.choice(["a", "b", "ab", "ba", "~", "", "c"]) for _ in range(29)]
    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 20),
            temperature=rng.choice([0.0, 1.0]),
            seed=number,
            stop=tuple(rng.sample(["abab", "≈b", "cc", "bac"], rng.randint(0, 3))),
            stop_token_ids=(rng.randrange(29),),
            logprobs=True,
        )
        for number in range(12)
    ]
    prompts = [[rng.randrange(29) for _ in range(rng.randint(1, 9))] for _ in params]
    outputs = make_engine(None, tokenizer=Pieces(pieces, eos=3)).generate(prompts, params)
    engine = make_engine(None, tokenizer=Pieces(pieces, eos=3))
    streams = [engine.stream(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    for stream, output in zip(streams, outputs, strict=True):
        events = list(stream)
        assert tuple(event.token for event in events) == output.tokens
        assert tuple(event.logprob for event in events) == output.logprobs
        assert [event.index for event in events] == list(range(len(events)))
        assert "".join(event.text for event in events) == output.text
        assert events[-1].finish_reason == output.finish_reason
    assert not engine.has_work


def test_leaving_a_stream_cancels_it() -> None:
    engine = make_engine()
    seen: list[TokenEvent] = []
    stream = engine.stream([1], SamplingParams(max_tokens=50))
    for event in stream:
        seen.append(event)
        if len(seen) == 3:
            break
    assert [event.token for event in seen] == [2, 3, 4]
    assert not engine.cancel(stream.id)
    engine.step()
    assert not engine.has_work
    assert list(stream) == []


def test_a_cancelled_stream_says_so() -> None:
    engine = make_engine()
    stream = engine.stream([1], SamplingParams(max_tokens=50), "mine")
    events = []
    for event in stream:
        events.append(event)
        engine.cancel("mine")
    assert [event.token for event in events] == [2, None]
    assert events[-1].finish_reason is FinishReason.CANCELLED
