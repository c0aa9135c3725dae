"""The process that renders a chat template: a program of others, so that it can be ended whatever it does.

`python -m partinf.serve.template_process` is started and talked to as `foundation.bounded_process` has it, in frames of JSON. The first
frame says what to render, every other is a conversation and is answered by one frame. The kernel holds the process to a time of a core
per conversation, however busy the machine is, and to a size in memory; one that exceeds the time is ended in the middle of whatever it
computes.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import msgspec

from partinf.foundation.bounded_process import bound_memory, connect, framed, next_frame
from partinf.serve.chat_template import ChatTemplate, TemplateRefusal

ENDED_FOR_MEMORY = 3  # the exit code


class Template(msgspec.Struct):
    """What to render, and its bounds: seconds of a core and characters per conversation, bytes beyond what it takes when idle.

    Half of a surrogate pair, which a template may hold, does not pass through msgspec; so its text and tokens are a JSON text within.
    """

    text_and_tokens: str
    seconds: float
    most: int
    memory: int


class Conversation(msgspec.Struct):
    """The variables of a template."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    more: dict[str, Any]


class Rendered(msgspec.Struct):
    """A prompt, or why there is none."""

    text: str | None = None
    refusal: str | None = None


def frame(content: msgspec.Struct) -> bytes:
    return framed(msgspec.json.encode(content))


def main() -> None:
    with connect() as server, server.makefile("rb") as frames:
        given = msgspec.json.decode(next_frame(frames), type=Template)
        template = ChatTemplate(*json.loads(given.text_and_tokens))  # compiled within the bounds, with the first conversation
        bound_memory(given.memory)
        while body := next_frame(frames):
            signal.setitimer(signal.ITIMER_PROF, given.seconds)  # of a core; SIGPROF is left to the kernel, which ends the process
            answer = frame(_render(template, body, given.most))
            signal.setitimer(signal.ITIMER_PROF, 0)
            server.sendall(answer)


def _render(template: ChatTemplate, body: bytes, most: int) -> Rendered:
    try:
        request = msgspec.json.decode(body, type=Conversation)
        return Rendered(template.render(request.messages, request.add_generation_prompt, request.more, most))
    except TemplateRefusal as refusal:
        return Rendered(refusal=str(refusal)[:1000])
    except MemoryError:
        os._exit(ENDED_FOR_MEMORY)  # the server must see how it ended, and the socket close with it


if __name__ == "__main__":
    main()
