"""Tools over HTTP: what the template is given, and the calls and reasoning that clients get, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.engine import FakeRunner
from partinf.foundation.errors import InvalidInput
from partinf.serve.chat_template import ChatTemplate
from partinf.serve.forced_calls import forced_schema
from partinf.serve.protocol import ChatBody, Message, Tool, ToolFunction
from partinf.serve.tool_calls import FORMATS
from tests.serve.support import LIMITS, Serving, events, fake_engine, serving
from tests.serve.test_openai_client import openai as openai  # the client in both majors

ROOT = Path(__file__).parents[2]
TOKENIZER = load_tokenizer(ROOT / "tests/fixtures/tokenizer_byte_level")
ROOMY = replace(LIMITS, vocab_size=TOKENIZER.vocab_size, max_len=4096, pages_per_shard=4096, constrained=True)
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} answer by <tool_call>{% endif %}{% for message in messages %}{{ message.role }}: "
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.city }})"
    "{% endfor %}\n{% endfor %}{% if think %}<think>\n{% elif never %}</think>{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "It rains.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
OTHER = {"type": "function", "function": {"name": "f"}}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Rain?"}], "tools": [WEATHER, OTHER], "temperature": 0}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


class Scripted(FakeRunner):
    """A runner whose answers are scripted."""

    def __init__(self) -> None:
        super().__init__(ROOMY, self._next)
        self._script: list[int] = []
        self._start = 0
        self.prompt = ""

    def say(self, text: str) -> None:
        self._script, self._start = [*TOKENIZER.encode(text, add_bos=False), *sorted(TOKENIZER.eos_ids)[:1]], 0

    def _next(self, context: Sequence[int]) -> int:
        if not self._start:
            self._start, self.prompt = len(context), TOKENIZER.decode(context, special=True)
        place = len(context) - self._start
        return self._script[min(place, len(self._script) - 1)]


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[Serving, Scripted]]:
    runner = Scripted()
    with serving(fake_engine(runner, tokenizer=TOKENIZER), TOKENIZER, ChatTemplate(TEMPLATE, {})) as found:
        yield found, runner


ScriptedServer = tuple[Serving, Scripted]


def whole(scripted: ScriptedServer, text: str, **more: Any) -> Any:
    scripted[1].say(text)
    status, answer, _ = scripted[0].post("/v1/chat/completions", CHAT | more)
    assert status == 200, answer
    return answer["choices"][0]


def joined(deltas: list[Any]) -> dict[str, Any]:
    """The message that the deltas of a stream add up to."""
    message: dict[str, Any] = {}
    calls: dict[int, Any] = {}
    for delta in deltas:
        for name, value in delta.items():
            if name != "tool_calls":
                message[name] = message.get(name, "") + value
        for call in delta.get("tool_calls", ()):
            kept = calls.setdefault(
                call["index"], {"id": call.get("id"), "type": call.get("type"), "function": {"name": "", "arguments": ""}}
            )
            for name, value in call["function"].items():
                kept["function"][name] += value
    return message | ({"tool_calls": [calls[index] for index in sorted(calls)]} if calls else {})


def streamed(scripted: ScriptedServer, text: str, **more: Any) -> tuple[dict[str, Any], str]:
    scripted[1].say(text)
    status, answer, _ = scripted[0].post("/v1/chat/completions", CHAT | {"stream": True} | more)
    assert status == 200, answer
    choices = [event["choices"][0] for event in events(answer)]
    (reason,) = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return joined([choice["delta"] for choice in choices]), reason


def same(scripted: ScriptedServer, text: str, **more: Any) -> tuple[dict[str, Any], str]:
    """The message and its end, whole as in a stream; without the ids of calls, which are new every time."""
    choice = whole(scripted, text, **more)
    message, reason = streamed(scripted, text, **more)
    found = {name: value for name, value in choice["message"].items() if value not in (None, "")}
    for call in [*found.get("tool_calls", ()), *message.get("tool_calls", ())]:
        assert call.pop("id").startswith("call_")
        assert call.pop("type") == "function"
    assert {name: value for name, value in message.items() if value} == found
    assert choice["finish_reason"] == reason
    return found, reason


def test_calls_are_separated(scripted: ScriptedServer) -> None:
    message, reason = same(scripted, f"Let me see.\n{CALL}\n{CALL.replace('Zürich', 'Bern')}")
    cities = [json.loads(call["function"]["arguments"])["city"] for call in message["tool_calls"]]
    assert (message["content"], cities, reason) == ("Let me see.", ["Zürich", "Bern"], "tool_calls")
    assert whole(scripted, CALL)["message"]["content"] is None
    message, _ = same(scripted, CALL + CALL, parallel_tool_calls=False)
    assert len(message["tool_calls"]) == 1
    assert same(scripted, "No rain.") == ({"role": "assistant", "content": "No rain."}, "stop")
    assert whole(scripted, CALL, max_tokens=40)["finish_reason"] == "length"


def test_the_template_is_given_tools_and_arguments(scripted: ScriptedServer) -> None:
    whole(scripted, "x")
    shown = scripted[1].prompt
    assert json.loads(shown[shown.index("[{") : shown.index(" answer by")]) == [WEATHER, OTHER]
    called = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
    history = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "content": "no", "tool_call_id": "call_1"},
    ]
    whole(scripted, "x", messages=history)
    assert "assistant: get_weather(Bern)tool: no" in scripted[1].prompt
    assert "answer by" not in (whole(scripted, "x", tool_choice="none") and scripted[1].prompt)
    assert same(scripted, CALL, tool_choice="none")[0]["content"] == CALL, "what was not offered is not looked for"
    status, answer, _ = scripted[0].post("/tokenize", {name: CHAT[name] for name in ("messages", "tools")})
    assert (status, answer["count"]) == (200, len(TOKENIZER.encode_marked(shown)))


def test_reasoning_is_separated(scripted: ScriptedServer) -> None:
    text = f"<think>\nRain, or <b>?\n</think>\n\nI ask.{CALL}"
    message, reason = same(scripted, text)
    assert (message["reasoning_content"], message["content"], reason) == ("Rain, or <b>?", "I ask.", "tool_calls")
    message, _ = same(scripted, "Rain?\n</think>\n\nYes.", tools=[], chat_template_kwargs={"think": True})
    assert (message["reasoning_content"], message["content"]) == ("Rain?", "Yes.")
    message, _ = same(scripted, "Yes.", tools=[])
    assert "reasoning_content" not in message


def test_samples_and_log_probabilities_with_calls(scripted: ScriptedServer) -> None:
    scripted[1].say(CALL)
    body = CHAT | {"n": 2, "logprobs": True, "top_logprobs": 1, "stream": True, "stream_options": {"include_usage": True}}
    found = events(scripted[0].post("/v1/chat/completions", body)[1])
    for sample in range(2):
        choices = [event["choices"][0] for event in found[:-1] if event["choices"][0]["index"] == sample]
        assert len(joined([choice["delta"] for choice in choices])["tool_calls"]) == 1
        tokens = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert len(tokens) * 2 == found[-1]["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    "more, param",
    [
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "some"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tools": [OTHER, OTHER]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]}, "tools[0].function.parameters"),
        ({"tools": [OTHER] * 129}, "tools"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_not_supported_is_refused_by_name(scripted: ScriptedServer, more: dict[str, Any], param: str) -> None:
    status, answer, _ = scripted[0].post("/v1/chat/completions", CHAT | more)
    assert status == 400, answer
    assert answer["error"]["param"].startswith(param), answer


CITY = '{"city": "Zürich"}'
LISTED = [{"name": "get_weather", "parameters": {"city": "Zürich"}}, {"name": "f", "parameters": {}}]


def test_calls_that_are_insisted_on(scripted: ScriptedServer) -> None:
    """The answer is held to them, whatever the model would say."""
    pytest.importorskip("llguidance")
    message, reason = same(scripted, CITY, tool_choice={"type": "function", "function": {"name": "get_weather"}})
    assert message["tool_calls"] == [{"function": {"name": "get_weather", "arguments": CITY}}]
    assert (message.get("content"), reason) == (None, "tool_calls")
    message, _ = same(scripted, json.dumps(LISTED, ensure_ascii=False), tool_choice="required")
    found = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
    assert found == [(one["name"], one["parameters"]) for one in LISTED]
    message, _ = same(scripted, json.dumps(LISTED[1:]), tool_choice="required", parallel_tool_calls=False)
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "f", "arguments": "{}"}]
    stubborn = whole(scripted, "No, I will not.", tool_choice="required", max_tokens=60)["message"]
    assert "No," not in (stubborn["content"] or "")


def test_definitions_that_tools_share() -> None:
    tool = Tool(type="function", function=ToolFunction(name="a", parameters={"$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}}))
    other = Tool(type="function", function=ToolFunction(name="b", parameters={"$ref": "#/$defs/x", "$defs": {"x": {"type": "string"}}}))
    ask = {"model": "demo", "messages": [Message(role="user", content="a")], "tool_choice": "required"}
    schema = forced_schema(ChatBody(**ask, tools=[tool]))  # type: ignore[arg-type]
    assert schema["$defs"] == {"x": {"type": "object"}}
    assert schema["items"]["anyOf"][0]["properties"]["parameters"] == {"$ref": "#/$defs/x"}
    with pytest.raises(InvalidInput, match="more than one way"):
        forced_schema(ChatBody(**ask, tools=[tool, other]))  # type: ignore[arg-type]


def test_templates_that_know_no_tools_or_no_format(shared: Serving) -> None:
    chat = CHAT | {"max_tokens": 1}
    error = shared.post("/v1/chat/completions", chat)[1]["error"]
    assert (error["param"], "template knows none" in error["message"]) == ("tools", True)
    assert shared.post("/v1/chat/completions", chat | {"tool_choice": "none"})[0] == 200
    unknown = ChatTemplate("{{ tools }}{{ messages[0].content }}", {})
    with serving(fake_engine(Scripted(), tokenizer=TOKENIZER), TOKENIZER, unknown) as found:
        error = found.post("/v1/chat/completions", chat)[1]["error"]
        assert (error["param"], "--tool-call-parser" in error["message"]) == ("tools", True)
    runner = Scripted()
    with serving(fake_engine(runner, tokenizer=TOKENIZER), TOKENIZER, unknown, tool_format=FORMATS["mistral"]) as found:
        runner.say('[TOOL_CALLS][{"name": "f", "arguments": {}}]')
        (call,) = found.post("/v1/chat/completions", CHAT)[1]["choices"][0]["message"]["tool_calls"]
        assert (call["function"], len(call["id"])) == ({"name": "f", "arguments": "{}"}, 9)


def test_a_conversation_with_tools_through_the_client(openai: ModuleType, scripted: ScriptedServer) -> None:
    """As users write it: ask, call, answer, streamed and whole."""
    with openai.OpenAI(base_url=f"{scripted[0].url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        messages: list[Any] = list(CHAT["messages"])
        scripted[1].say(CALL)
        answer = client.chat.completions.create(model="demo", temperature=0, messages=messages, tools=CHAT["tools"], tool_choice="auto")
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Zürich"})
        assert answer.choices[0].finish_reason == "tool_calls"
        messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
        scripted[1].say("<think>Rain.</think>It rains in Zürich.")
        answer = client.chat.completions.create(model="demo", temperature=0, messages=messages, tools=CHAT["tools"])
        assert answer.choices[0].message.content == "It rains in Zürich."
        assert answer.choices[0].message.reasoning_content == "Rain."
        assert "assistant: get_weather(Zürich)tool: It rains." in scripted[1].prompt
        scripted[1].say(CALL)
        with client.chat.completions.stream(model="demo", temperature=0, messages=messages, tools=CHAT["tools"]) as stream:
            (call,) = stream.get_final_completion().choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Zürich"}


def test_the_format_is_named_at_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from partinf.cli.dispatch import main

    assert main(["serve", "--model", "demo", "--tool-call-parser", "herms"]) == 2
    assert "did you mean 'hermes'" in capsys.readouterr().err
