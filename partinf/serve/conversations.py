"""Conversations as the model's template gets them, and what it writes of them.

The template finds what transformers would give it. What clients may write in several forms reaches it in the one that it reads: contents
as a text or as a list of parts, and the arguments of tool calls, which are JSON in a string with OpenAI, as an object.
"""

from __future__ import annotations

from typing import Any

import msgspec

from partinf.serve.chat_template import ChatTemplate, TemplateRefusal
from partinf.serve.errors import Offence
from partinf.serve.protocol import ChatBody, Message, TextPart
from partinf.serve.template_processes import TemplateBounds, TemplateProcesses

_RESERVED = ("messages", "add_generation_prompt")


class Conversations:
    """Writes conversations by one template."""

    def __init__(self, template: ChatTemplate, bounds: TemplateBounds) -> None:
        self._form = template.form
        self._processes = TemplateProcesses(template, bounds)

    def read(self, body: ChatBody, offences: list[Offence]) -> bytes | None:
        """What `text` takes of a conversation; None where that is wrong, for the reasons that joined the offences."""
        found: list[Offence] = []
        messages = [self._plain(message, f"messages[{place}]", found) for place, message in enumerate(body.messages)]
        if reserved := [name for name in _RESERVED if name in body.chat_template_kwargs]:
            found.append(Offence(f"chat_template_kwargs may not hold {' or '.join(reserved)}", "chat_template_kwargs"))
        offences += found
        return None if found else self._processes.read(messages, body.add_generation_prompt, body.chat_template_kwargs)

    async def text(self, conversation: bytes, offences: list[Offence]) -> str | None:
        """The prompt of a conversation; None where the template makes none, for the reason that joined the offences.

        Raises:
            Overloaded: too many are being written already.
        """
        try:
            return await self._processes.render(conversation)
        except TemplateRefusal as refusal:
            offences.append(Offence(str(refusal), "messages"))
            return None

    def close(self) -> None:
        """Stop writing, at once."""
        self._processes.close()

    def _plain(self, message: Message, where: str, offences: list[Offence]) -> dict[str, Any]:
        """A message as the template expects it: a mapping, without what was not given."""
        if message.content is None and not message.tool_calls:
            offences.append(Offence(f"{where}.content is missing; it is required", f"{where}.content"))
            return {}
        plain: dict[str, Any] = msgspec.to_builtins(message)
        plain.pop("cache_control", None)
        if message.content is not None:
            plain["content"] = self._content(message.content)
        if message.tool_calls:
            plain["tool_calls"] = [
                _tool_call(call, f"{where}.tool_calls[{place}]", offences) for place, call in enumerate(message.tool_calls)
            ]
        return plain

    def _content(self, content: str | list[TextPart]) -> str | list[dict[str, str]]:
        if isinstance(content, list):
            return [_part(part.text) for part in content] if self._form.walks else "\n".join(part.text for part in content)
        return [_part(content)] if self._form.walks and not self._form.tests else content


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _tool_call(call: dict[str, Any], where: str, offences: list[Offence]) -> dict[str, Any]:
    """A tool call whose arguments are an object, whichever way they came."""
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, str):
        return call
    name = f"{where}.function.arguments"
    try:
        read = msgspec.json.decode(arguments) if arguments.strip() else {}
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        offences.append(Offence(f"{name} is a string, but not JSON: {error}", name))
        return call
    if not isinstance(read, dict):
        offences.append(Offence(f"{name} is JSON, but no object", name))
    return {**call, "function": {**function, "arguments": read}}
