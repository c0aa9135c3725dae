"""Answers whose form clients ask for, over HTTP: kept to, refused with the reason, and no burden to others."""

from __future__ import annotations

import concurrent.futures
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from partinf.engine import Engine, FakeRunner
from partinf.serve import structures
from partinf.serve.chat_template import ChatTemplate
from tests.serve.support import LIMITS, Serving, events, serving
from tests.structured.support import TOKENIZER, in_doubt

ROOM = replace(LIMITS, vocab_size=300, max_len=1024, pages_per_shard=8 * 256)
PROMPT: dict[str, Any] = {"model": "demo", "prompt": "an answer:", "max_tokens": 900, "temperature": 0}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "answer"}], "max_tokens": 900, "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TEMPLATE = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}", {})


@pytest.fixture(scope="module")
def doubting() -> Iterator[Serving]:
    engine = Engine(FakeRunner(ROOM, in_doubt), tokenizer=TOKENIZER, lag=1, check_invariants=True)
    with serving(engine, TOKENIZER, TEMPLATE) as found:
        yield found


def texts(serving: Serving, path: str, body: dict[str, Any]) -> list[str]:
    status, answer, _ = serving.post(f"/v1/{path}", body)
    assert status == 200, answer
    assert all(choice["finish_reason"] == "stop" for choice in answer["choices"])
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in answer["choices"]]


def refused(serving: Serving, body: dict[str, Any]) -> dict[str, Any]:
    status, answer, _ = serving.post("/v1/completions", body)
    assert status == 400, answer
    return answer["error"]


def is_person(text: str) -> bool:
    person = json.loads(text)
    return set(person) == {"name", "age"} and len(person["name"]) <= 8 and 0 <= person["age"] < 100


FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(("path", "body"), [("completions", PROMPT), ("chat/completions", CHAT)])
def test_schemas_of_either_kind_of_client(doubting: Serving, path: str, body: dict[str, Any]) -> None:
    for fields in (
        {"response_format": FORMAT},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}},
        {
            "response_format": FORMAT,
            "n": 3,
            "temperature": 1.0,
            "seed": 5,
            "presence_penalty": 0.5,
            "logprobs": 1 if path == "completions" else True,
        },
        {"response_format": {"type": "text"}, "structured_outputs": {"json": SCHEMA}},
    ):
        assert all(map(is_person, texts(doubting, path, body | fields)))
    (text,) = texts(doubting, path, body | {"response_format": {"type": "json_object"}})
    assert isinstance(json.loads(text), dict)


def test_other_structures(doubting: Serving) -> None:
    answer = lambda **how: texts(doubting, "completions", PROMPT | {"structured_outputs": how})[0]  # noqa: E731
    assert re.fullmatch("[a-f]{4}-[0-9]+!", answer(regex="[a-f]{4}-[0-9]+!"))
    assert answer(choice=["yes", "no"]) in ("yes", "no")
    assert re.fullmatch("(ab)+!", answer(grammar='start: "ab"+ "!"'))
    assert isinstance(json.loads(answer(json_object=True)), dict)


def test_a_stream_has_the_same_text_and_ends_once(doubting: Serving) -> None:
    body = PROMPT | {"structured_outputs": {"regex": "[a-f]{9}"}}
    whole = texts(doubting, "completions", body)[0]
    status, content, _ = doubting.post("/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    assert status == 200
    *parts, usage = events(content)
    assert "".join(part["choices"][0]["text"] for part in parts) == whole
    assert [part["choices"][0]["finish_reason"] for part in parts if part["choices"][0]["finish_reason"]] == ["stop"]
    assert usage["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "enum"),
        ({"response_format": FORMAT | {"schema": {}}}, "response_format", "no field of it"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format.json_schema",
            "not",
        ),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "json: "),
        ({"structured_outputs": {}}, "structured_outputs", "asks for nothing; give one of json, regex, choice, grammar, json_object"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "an answer has one form"),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, "structured_outputs.regex", "an answer has one form"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag is not supported"),
        ({"structured_outputs": {"regex": "ab"}, "min_tokens": 3}, "min_tokens", "held to a grammar"),
    ],
)
def test_refusals_name_the_parameter_and_the_reason(doubting: Serving, fields: dict[str, Any], param: str, why: str) -> None:
    error = refused(doubting, PROMPT | fields)
    assert error["param"] == param, error
    assert why in error["message"]


def test_what_cannot_be_done_here_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    body = PROMPT | {"structured_outputs": {"regex": "a"}}
    with serving(Engine(FakeRunner(replace(ROOM, constrained=False)), tokenizer=TOKENIZER), TOKENIZER) as found:
        assert "the steps were compiled without it" in refused(found, body)["message"]
    monkeypatch.setattr(structures, "missing", lambda: "structured output needs llguidance: pip install 'partinf[serve]'")
    with serving(Engine(FakeRunner(ROOM), tokenizer=TOKENIZER), TOKENIZER) as found:
        assert "pip install 'partinf[serve]'" in refused(found, body)["message"]


def test_hostile_schemas_do_not_keep_others_waiting(doubting: Serving) -> None:
    """Schemas that take long to compile, more than may be compiled at once, alongside a plain request."""
    large = [{"enum": [f"{number}-{index}" for index in range(4000)]} for number in range(6)]
    bodies = [PROMPT | {"structured_outputs": {"json": schema}, "max_tokens": 5} for schema in large]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(doubting.post, "/v1/completions", body) for body in bodies]
        plain = [pool.submit(texts_of_any_end, doubting) for _ in range(3)]
        assert all(future.result() for future in plain)
        assert {future.result()[0] for future in slow} <= {200, 400, 429}
    doubting.wait_idle()


def texts_of_any_end(serving: Serving) -> bool:
    status, _, _ = serving.post("/v1/completions", PROMPT | {"max_tokens": 5})
    return status == 200
