"""Parameters that change nothing are taken, whatever sends them; what would change something and is not supported is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.support import Serving, events

TEXT = {"model": "demo", "prompt": "copy: a b =", "max_tokens": 4, "seed": 1}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "copy: a ="}], "max_tokens": 4, "seed": 1}
PATHS = {"/v1/completions": TEXT, "/v1/chat/completions": CHAT}

HINTS = {
    "store": True,
    "metadata": {"run": "7"},
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "parallel_tool_calls": True,
    "user": "u",
}
IDLE = {
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "best_of": 1,
    "min_tokens": 0,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "include_stop_str_in_output": False,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "bad_words": [],
    "logit_bias": {},
    "stream_options": {"include_usage": False},
    "top_k": -1,
    "stop": [],
    "frequency_penalty": -0.0,
}
NULLS = [
    "min_tokens",
    "guided_json",
    "truncate_prompt_tokens",
    "a_name_of_tomorrow",
    "store",
    "metadata",
    "stream_options",
    "best_of",
    "top_p",
    "n",
]


@pytest.mark.parametrize("path", PATHS)
def test_hints_idle_values_and_nulls(shared: Serving, path: str) -> None:
    plain = shared.post(path, PATHS[path])[1]["choices"]
    for more in (HINTS, IDLE, dict.fromkeys(NULLS)):
        status, answer, _ = shared.post(path, PATHS[path] | more)
        assert (status, answer.get("choices")) == (200, plain), answer


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "name, value",
    [
        ("min_tokens", 5),
        ("use_beam_search", True),
        ("length_penalty", 0.5),
        ("guided_json", {}),
        ("response_format", {"type": "json_object"}),
        ("truncate_prompt_tokens", 0),
        ("prompt_logprobs", 2),
        ("a_name_of_tomorrow", 0),
        ("store", "yes"),
        ("metadata", "m"),
    ],
)
def test_what_would_change_something_is_refused_by_name(shared: Serving, path: str, name: str, value: object) -> None:
    status, answer, _ = shared.post(path, PATHS[path] | {name: value})
    assert (status, answer["error"]["param"]) == (400, name), answer
    assert name in answer["error"]["message"]


def test_least_tokens_where_nothing_ends_the_text_before(shared: Serving) -> None:
    body = TEXT | {"ignore_eos": True}
    whole = shared.post("/v1/completions", body)[1]["choices"]
    assert shared.post("/v1/completions", body | {"min_tokens": 4})[1]["choices"] == whole


@pytest.mark.parametrize(
    "more",
    [
        {"annotations": None, "audio": None, "function_call": None, "refusal": None, "tool_calls": None},
        {"annotations": [], "a_name_of_tomorrow": None, "name": None},
        {"reasoning_content": "r", "reasoning": "r"},
        {"cache_control": {"type": "ephemeral"}},
        {"content": [{"type": "text", "text": "a b", "cache_control": {"type": "ephemeral"}, "annotations": None}]},
    ],
)
def test_answers_that_are_sent_back(shared: Serving, more: dict[str, Any]) -> None:
    first, last = {"role": "user", "content": "copy: a b ="}, {"role": "user", "content": "copy: a ="}
    plain, sent = ({"messages": [first, {"role": "assistant", "content": "a b"} | extra, last]} for extra in ({}, more))
    expected = shared.post("/v1/chat/completions", CHAT | plain)[1]["choices"]
    status, answer, _ = shared.post("/v1/chat/completions", CHAT | sent)
    assert (status, answer.get("choices")) == (200, expected), answer


@pytest.mark.parametrize("more", [{"function_call": {"name": "f"}}, {"audio": {"id": "a"}}, {"refusal": "no"}, {"weight": 0}])
def test_messages_that_hold_more_are_refused_by_name(shared: Serving, more: dict[str, Any]) -> None:
    message = {"role": "assistant", "content": "a"} | more
    error = shared.post("/v1/chat/completions", CHAT | {"messages": [message]})[1]["error"]
    assert error["param"] == "messages[0]"
    assert next(iter(more)) in error["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("more", [{}, {"n": 2}, {"logprobs": 1, "top_logprobs": 1}, {"ignore_eos": True, "stop": "o"}])
def test_the_usage_so_far(shared: Serving, path: str, more: dict[str, Any]) -> None:
    if "logprobs" in more:
        more = more if "chat" not in path else more | {"logprobs": True}
        more = more if "chat" in path else {"logprobs": 1}
    body = PATHS[path] | {"stream": True, "max_tokens": 9} | more
    sent = events(shared.post(path, body | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}})[1])
    counts = [event["usage"]["completion_tokens"] for event in sent]
    assert counts == sorted(counts)
    assert counts[-2] == counts[-1], "the last token is counted with its event"
    assert len(set(counts)) > 2
    last = sent[-1]["usage"]
    assert all(event["usage"]["prompt_tokens"] == last["prompt_tokens"] for event in sent)
    assert all(
        sum(event["usage"][key] for key in ("prompt_tokens", "completion_tokens")) == event["usage"]["total_tokens"] for event in sent
    )
    plain = events(shared.post(path, body | {"stream_options": {"continuous_usage_stats": True}})[1])
    assert all("usage" not in event for event in plain)
