"""Conversations as the model's template gets them, and what it writes of them.

The template finds what transformers would give it. What clients may write in several forms reaches it in the one that it reads: contents
as a text or as a list of parts, and the arguments of tool calls, which are JSON in a string with OpenAI, as an object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from partinf.serve.chat_template import ChatTemplate, TemplateRefusal
from partinf.serve.errors import Offence, Quoting
from partinf.serve.protocol import ChatBody, Message, TextPart
from partinf.serve.template_processes import TemplateBounds, TemplateProcesses

_RESERVED = ("messages", "add_generation_prompt")


@dataclass(frozen=True)
class Conversation:
    """A conversation for the template.

    Attributes:
        frame: as the process that renders it takes it. final: the text of the last message, where the answer is to continue it.
    """

    frame: bytes
    final: str | None = None


class Conversations:
    """Writes conversations by one template."""

    def __init__(self, template: ChatTemplate, bounds: TemplateBounds) -> None:
        self._form = template.form
        self._processes = TemplateProcesses(template, bounds)

    def read(self, body: ChatBody, offences: list[Offence]) -> Conversation | None:
        """What `text` takes of a conversation; None where that is wrong, for the reasons that joined the offences."""
        found: list[Offence] = []
        messages = [self._plain(message, f"messages[{place}]", found) for place, message in enumerate(body.messages)]
        if reserved := [name for name in _RESERVED if name in body.chat_template_kwargs]:
            found.append(Offence(f"chat_template_kwargs may not hold {' or '.join(reserved)}", "chat_template_kwargs"))
        final = _text(body.messages[-1]) if body.continue_final_message else None
        if body.continue_final_message and body.add_generation_prompt:
            found.append(Offence("continue_final_message and add_generation_prompt exclude each other", "continue_final_message"))
        elif final is not None and not final.strip():
            found.append(Offence("continue_final_message needs a last message with a text", "continue_final_message"))
        offences += found
        if found:
            return None
        prompts = body.add_generation_prompt is not False and final is None
        return Conversation(self._processes.read(messages, prompts, body.chat_template_kwargs), final)

    async def text(self, conversation: Conversation, offences: list[Offence]) -> str | None:
        """The prompt of a conversation; None where the template makes none, for the reason that joined the offences.

        Raises:
            Overloaded: too many are being written already.
        """
        try:
            text = await self._processes.render(conversation.frame)
        except TemplateRefusal as refusal:
            offences.append(Quoting(str(refusal), "messages", "the model's chat template does not take the messages"))
            return None
        if conversation.final is None:
            return text
        if (cut := _up_to(text, conversation.final)) is None:
            offences.append(Offence("the model's chat template does not write the last message as it is", "continue_final_message"))
        return cut

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


def _text(message: Message) -> str:
    """The text of a message, the last part's where it has several."""
    content = message.content
    return (content[-1].text if content else "") if isinstance(content, list) else content or ""


def _up_to(text: str, final: str) -> str | None:
    """A conversation up to the end of its last message, without the blanks there if the template leaves them out; None if that is not
    in it."""
    bare = final.strip()
    start = text.rfind(bare)
    if start < 0:
        return None
    whole = final.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else bare)]


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
