"""What users of LangChain write. Arguments: the URL of the demo model, and of one that calls tools."""

from __future__ import annotations

import sys
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

DEMO, RAIN = sys.argv[1:]
SORT, SORTED = "sort: d b a c =", " a b c d"


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"It rains in {city}."


class Rain(BaseModel):
    """Whether it rains."""

    rain: bool


def texts() -> None:
    chat = ChatOpenAI(base_url=f"{DEMO}/v1", api_key="unused", model="demo", temperature=0, max_retries=0)
    assert chat.invoke(SORT).content == SORTED
    assert "".join(str(chunk.content) for chunk in chat.stream(SORT)) == SORTED
    assert [answer.content for answer in chat.batch([f"copy: q {letter} z =" for letter in "abcd"])] == [
        f" q {letter} z" for letter in "abcd"
    ]
    plain = OpenAI(base_url=f"{DEMO}/v1", api_key="unused", model="demo", temperature=0, max_retries=0, max_tokens=16)
    assert plain.invoke(SORT) == SORTED
    assert "".join(plain.stream(SORT)) == SORTED


def conversation(chat: ChatOpenAI, streamed: bool) -> None:
    """A question, a tool call, its result, the answer."""
    model = chat.bind_tools([get_weather])
    messages: list[Any] = [HumanMessage("Does it rain in Zürich?")]

    def say() -> AIMessage:
        if not streamed:
            return model.invoke(messages)
        pieces = list(model.stream(messages))
        assert len(pieces) > 3
        whole = pieces[0]
        for piece in pieces[1:]:
            whole = whole + piece
        return whole

    called = say()
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Zürich"})
    answer = get_weather.invoke(call)
    assert isinstance(answer, ToolMessage)
    messages += [called, answer]
    assert say().content == "It rains in Zürich."


texts()
rain = ChatOpenAI(base_url=f"{RAIN}/v1", api_key="unused", model="demo", temperature=0, max_retries=0, max_tokens=900)
conversation(rain, streamed=False)
conversation(rain, streamed=True)
for method in ("json_schema", "function_calling"):
    found = rain.with_structured_output(Rain, method=method).invoke("Does it rain?")
    assert isinstance(found, Rain), found
