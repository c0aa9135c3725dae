"""What users of OpenAI's client write, in one major of it. Arguments: its version, the URL of the demo model, and of one that calls tools.

Prints nothing and exits with 0 if every answer is the one that is due.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai

VERSION, DEMO, RAIN = sys.argv[1:]
SORT, SORTED = "sort: d b a c =", " a b c d"
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
QUESTION = {"role": "user", "content": "Does it rain in Zürich?"}
SETTINGS: dict[str, Any] = {"model": "demo", "temperature": 0}


def texts(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    answer = client.completions.create(**SETTINGS, prompt=[SORT, "copy: a b ="])
    assert [choice.text for choice in answer.choices] == [SORTED, " a b"]
    pieces = client.completions.create(**SETTINGS, prompt=SORT, stream=True, stream_options={"include_usage": True})
    chunks = list(pieces)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == SORTED
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    messages: list[Any] = [{"role": "user", "content": SORT}]
    whole = client.chat.completions.create(**SETTINGS, messages=messages, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == SORTED
    assert whole.choices[0].logprobs is not None
    stream = client.chat.completions.create(**SETTINGS, messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == SORTED
    raw = client.chat.completions.with_raw_response.create(**SETTINGS, messages=messages, extra_headers={"x-request-id": "mine"})
    assert raw.headers["x-request-id"] == "mine"
    try:
        client.completions.create(**SETTINGS, prompt=SORT, suffix="x")
    except openai.BadRequestError as error:
        assert (error.param, "suffix" in error.message) == ("suffix", True)  # noqa: PT017
    else:
        raise AssertionError("suffix was taken")


def conversation(client: openai.OpenAI, streamed: bool) -> None:
    """A question, a tool call, its result, the answer."""
    messages: list[Any] = [QUESTION]

    def say() -> Any:
        if not streamed:
            return client.chat.completions.create(**SETTINGS, messages=messages, tools=TOOLS).choices[0].message
        content, calls = "", dict[int, Any]()
        for chunk in client.chat.completions.create(**SETTINGS, messages=messages, tools=TOOLS, stream=True):
            delta = chunk.choices[0].delta
            content += delta.content or ""
            for call in delta.tool_calls or ():
                kept = calls.setdefault(call.index, {"id": call.id, "type": "function", "function": {"name": "", "arguments": ""}})
                kept["function"]["name"] += call.function.name or ""
                kept["function"]["arguments"] += call.function.arguments or ""
        fields = {"role": "assistant", "content": content or None} | (
            {"tool_calls": [calls[index] for index in sorted(calls)]} if calls else {}
        )
        return openai.types.chat.ChatCompletionMessage.model_validate(fields)

    called = say()
    (call,) = called.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Zürich"})
    messages += [called.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    assert say().content == "It rains in Zürich."


def held(client: openai.OpenAI) -> None:
    """Answers that have to have a form."""
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    for how in ("required", choice):
        answer = client.chat.completions.create(**SETTINGS, messages=[QUESTION], tools=TOOLS, tool_choice=how, max_tokens=900)
        calls: Any = answer.choices[0].message.tool_calls
        assert calls[0].function.name == "get_weather"
        assert "city" in json.loads(calls[0].function.arguments)
    schema = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "rain", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(**SETTINGS, messages=[QUESTION], response_format=form)
    assert json.loads(answer.choices[0].message.content or "")["rain"] in (True, False)


async def beside_each_other() -> None:
    async with openai.AsyncOpenAI(base_url=f"{DEMO}/v1", api_key="unused", max_retries=0) as client:
        answers = (client.completions.create(**SETTINGS, prompt=f"copy: q {letter} z =") for letter in "abcdefgh")
        assert [answer.choices[0].text for answer in await asyncio.gather(*answers)] == [f" q {letter} z" for letter in "abcdefgh"]


assert openai.__version__.startswith(f"{VERSION}."), openai.__version__
with openai.OpenAI(base_url=f"{DEMO}/v1", api_key="unused", max_retries=0) as demo:
    texts(demo)
with openai.OpenAI(base_url=f"{RAIN}/v1", api_key="unused", max_retries=0) as rain:
    conversation(rain, streamed=False)
    conversation(rain, streamed=True)
    held(rain)
asyncio.run(beside_each_other())
