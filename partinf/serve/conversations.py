"""Conversations as the model's template gets them, and what it writes of them.

The template finds what transformers would give it. What clients may write in several forms reaches it in the one that it reads: contents
as a text or as a list of parts, and the arguments of tool calls, which are JSON in a string with OpenAI, as an object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from partinf.serve.chat_template import ChatTemplate, TemplateRefusal
from partinf.serve.errors import Offence, Quoting
from partinf.serve.forced_calls import forced, forced_reader
from partinf.serve.protocol import ChatBody, Message, TextPart, ToolChoice
from partinf.serve.replies import THINK, THOUGHT, ReplyReader
from partinf.serve.template_processes import TemplateBounds, TemplateProcesses
from partinf.serve.tool_calls import FORMATS, CallReader, ToolFormat, format_of

_RESERVED = ("messages", "add_generation_prompt", "tools")


@dataclass(frozen=True)
class Conversation:
    """A conversation for the template.

    Attributes:
        frame: as the process that renders it takes it. final: the text of the last message, where the answer is to continue it.
    """

    frame: bytes
    final: str | None = None


class Conversations:
    """Writes conversations by one template.

    Attributes:
        tool_format: in which the model writes calls; None where it is not known, or the template knows no tools.
        thinks: whether the template marks reasoning.
    """

    def __init__(self, template: ChatTemplate, bounds: TemplateBounds, tool_format: ToolFormat | None = None) -> None:
        """
        Args:
            tool_format: if it is not to be found out from the template.
        """
        self._form = template.form
        self._knows_tools = template.knows_tools
        self.tool_format = (tool_format or format_of(template.source)) if template.knows_tools else None
        self.thinks = THOUGHT in template.source
        self._processes = TemplateProcesses(template, bounds)

    def read(self, body: ChatBody, offences: list[Offence]) -> Conversation | None:
        """What `text` takes of a conversation; None where that is wrong, for the reasons that joined the offences."""
        found: list[Offence] = []
        messages = [self._plain(message, f"messages[{place}]", found) for place, message in enumerate(body.messages)]
        if reserved := [name for name in _RESERVED if name in body.chat_template_kwargs]:
            found.append(Offence(f"chat_template_kwargs may not hold {' or '.join(reserved)}", "chat_template_kwargs"))
        found += self._tool_offences(body)
        final = _text(body.messages[-1]) if body.continue_final_message else None
        if body.continue_final_message and body.add_generation_prompt:
            found.append(Offence("continue_final_message and add_generation_prompt exclude each other", "continue_final_message"))
        elif final is not None and not final.strip():
            found.append(Offence("continue_final_message needs a last message with a text", "continue_final_message"))
        offences += found
        if found:
            return None
        prompts = body.add_generation_prompt is not False and final is None
        more = body.chat_template_kwargs
        if body.offered:
            more = more | {"tools": [msgspec.to_builtins(tool) for tool in body.offered]}
        return Conversation(self._processes.read(messages, prompts, more), final)

    def reader(self, body: ChatBody, prompt: str) -> Callable[[], ReplyReader] | None:
        """Makes what reads an answer to this prompt; None where it is nothing but text."""
        if forced(body):
            return lambda: ReplyReader(False, False, forced_reader(body))
        inside = self.thinks and prompt.rstrip().endswith(THINK)
        form, names = self.tool_format, frozenset(tool.function.name for tool in body.offered)
        if form is None or not names:
            return (lambda: ReplyReader(True, inside, None)) if self.thinks else None
        parallel = body.parallel_tool_calls is not False
        return lambda: ReplyReader(self.thinks, inside, CallReader(form, names, parallel))

    def _tool_offences(self, body: ChatBody) -> Iterator[Offence]:
        """What is requested of tools and not supported."""
        choice = body.tool_choice
        if not body.tools:
            if choice not in (None, "none", "auto"):
                yield Offence("tool_choice needs tools", "tool_choice")
            return
        names = [tool.function.name for tool in body.tools]
        if isinstance(choice, ToolChoice) and choice.function.name not in names:
            yield Offence(f"tool_choice names {choice.function.name[:80]!r}, which is not among the tools", "tool_choice")
        if len(set(names)) < len(names):
            yield Offence("tools holds the same name more than once", "tools")
        if choice == "none":
            return
        if not self._knows_tools:
            yield Offence("tools: the model's chat template knows none", "tools")
        elif self.tool_format is None and not forced(body):
            known = ", ".join(FORMATS)
            yield Offence(f"tools: how the model writes calls is not known; partinf serve --tool-call-parser says it: {known}", "tools")

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
