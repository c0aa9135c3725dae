"""Prompts in the forms that clients give them, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from partinf.checkpoint.tokenizer import Tokenizer
from partinf.engine.admission import RequestCheck
from partinf.engine.runner import RunnerLimits
from partinf.serve.chat_template import ChatTemplate, TemplateRefusal
from partinf.serve.errors import Offence, invalid
from partinf.serve.protocol import ChatBody, CompletionBody, Message


@dataclass(frozen=True)
class Served:
    """What can be asked of.

    Attributes:
        names: of the model, the first is the one that answers bear. check: what the engine takes.
        max_choices: prompts times samples of one request.
    """

    names: tuple[str, ...]
    limits: RunnerLimits
    check: RequestCheck
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    max_choices: int = 256


def given_prompts(body: CompletionBody, served: Served, offences: list[Offence]) -> list[str | list[int]]:
    """One text or list of ids, or a list of either."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    if ids:
        offences.append(Offence("prompt mixes token ids with whole prompts; give one list of ids, or a list of prompts", "prompt"))
    if len(prompt) > served.max_choices:
        offences.append(Offence(f"prompt holds {len(prompt)} prompts; at most {served.max_choices}", "prompt"))
        return []
    return [item for item in prompt if not isinstance(item, int)]


def encoded(prompt: str | list[int], name: str, served: Served, offences: list[Offence]) -> list[int]:
    """The ids of a prompt. What is wrong with ids the engine says."""
    if isinstance(prompt, list):
        return prompt
    if served.tokenizer is None:
        offences.append(Offence("this model has no tokenizer; give the prompt as token ids", name))
        return []
    return served.tokenizer.encode(prompt) if prompt else []


def as_text(prompt: str | list[int], served: Served) -> str:
    if isinstance(prompt, str):
        return prompt
    return "" if served.tokenizer is None else served.tokenizer.decode(prompt)


def rendered(body: ChatBody, served: Served, offences: list[Offence]) -> list[int] | None:
    """The prompt of a conversation, as the model's template writes it; None where that is not known, for the reasons in `offences`."""
    if served.tokenizer is None or served.chat_template is None:
        missing = "tokenizer" if served.tokenizer is None else "chat template (partinf serve --chat-template FILE gives it one)"
        raise invalid([*offences, Offence(f"the model has no {missing}; use /v1/completions", "messages")])
    before = len(offences)
    for place, message in enumerate(body.messages):
        if message.content is None and not message.tool_calls:
            offences.append(Offence(f"messages[{place}].content is missing; it is required", f"messages[{place}].content"))
    if len(offences) > before:
        return None
    reserved = {"messages", "add_generation_prompt"} & body.chat_template_kwargs.keys()
    if reserved:
        offences.append(Offence(f"chat_template_kwargs may not hold {' or '.join(sorted(reserved))}", "chat_template_kwargs"))
        return None
    try:
        text = served.chat_template.render(
            [_plain(message) for message in body.messages], body.add_generation_prompt, body.chat_template_kwargs
        )
    except TemplateRefusal as refusal:
        offences.append(Offence(str(refusal), "messages"))
        return None
    return served.tokenizer.encode_marked(text)


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: a mapping, its content one text."""
    plain: dict[str, Any] = msgspec.to_builtins(message)
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content)
    return plain


def length_offence(prompt: list[int], name: str, max_tokens: int, max_name: str, limits: RunnerLimits) -> Offence | None:
    """A prompt that is too long, or leaves no room for what is asked."""
    context, longest = limits.max_context, limits.max_prompt_len
    if len(prompt) > longest:
        return Offence(f"{name} has {len(prompt)} tokens; the context holds {context}, and the longest prompt is {longest}", name)
    if len(prompt) + max_tokens > context:
        return Offence(f"{max_name} = {max_tokens} is too many after {len(prompt)} tokens of {name}; the context holds {context}", max_name)
    return None
