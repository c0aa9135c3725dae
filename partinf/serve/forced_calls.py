"""Calls that a client insists on: the form that an answer is held to then, and how it is read.

A named tool is called with the whole answer as its arguments; where any tool will do, the answer is a list of names and arguments.
"""

from __future__ import annotations

from typing import Any

from partinf.foundation.errors import InvalidInput
from partinf.serve.protocol import ChatBody, Tool, ToolChoice
from partinf.serve.tool_calls import CallPart, CallReader, Part, ToolFormat

_LIST = ToolFormat("\0", between="[],", bare="[")
_SHARED = ("$defs", "definitions")  # what a schema refers to from its root


class NamedCall:
    """Reads an answer that is the arguments of one tool.

    Attributes:
        count: of calls so far.
    """

    def __init__(self, name: str) -> None:
        self.count = 0
        self._name = name

    def push(self, text: str, part: Part) -> None:
        """Read on; what is found joins the part."""
        if text:
            part.calls.append(CallPart(0, None if self.count else self._name, text))
            self.count = 1

    def finish(self, part: Part) -> None:
        """No more text comes."""


def forced(body: ChatBody) -> bool:
    """Whether a client insists on a call."""
    return bool(body.tools) and (body.tool_choice == "required" or isinstance(body.tool_choice, ToolChoice))


def forced_reader(body: ChatBody) -> NamedCall | CallReader:
    """Of an answer that is held to `forced_schema`."""
    if isinstance(body.tool_choice, ToolChoice):
        return NamedCall(body.tool_choice.function.name)
    return CallReader(_LIST, frozenset(tool.function.name for tool in body.tools), body.parallel_tool_calls is not False)


def forced_schema(body: ChatBody) -> dict[str, Any]:
    """The JSON that the answer must be.

    Raises:
        InvalidInput: tools that call different things by one name.
    """
    if isinstance(body.tool_choice, ToolChoice):
        return next((_parameters(tool) for tool in body.tools if tool.function.name == body.tool_choice.function.name), {})
    shared: dict[str, dict[str, Any]] = {}
    items = []
    for tool in body.tools:
        schema = dict(_parameters(tool))
        for key in _SHARED:
            for name, value in (schema.pop(key, None) or {}).items():
                if shared.setdefault(key, {}).setdefault(name, value) != value:
                    raise InvalidInput(f"tools define {key}/{name} in more than one way; rename one of them")
        properties = {"name": {"const": tool.function.name}, "parameters": schema}
        items.append({"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False})
    most = {"maxItems": 1} if body.parallel_tool_calls is False else {}
    return {"type": "array", "minItems": 1, "items": {"anyOf": items}} | most | shared


def _parameters(tool: Tool) -> dict[str, Any]:
    """A tool's schema; one without takes an empty object."""
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
