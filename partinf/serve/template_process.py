"""The process that renders a chat template: a program of others, so that it can be ended whatever it does.

`python -m partinf.serve.template_process` talks over the socket that is its standard input, in frames: four bytes of length, then JSON.
The first frame says what to render, every other is a conversation and is answered by one frame. The kernel holds the process to a time per
conversation and to a size in memory; one that exceeds the time is ended in the middle of whatever it computes.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import struct
from pathlib import Path
from typing import Any

import msgspec

from partinf.serve.chat_template import ChatTemplate, TemplateRefusal

LENGTH = struct.Struct("!I")
ENDED_FOR_MEMORY = 3  # the exit code


class Template(msgspec.Struct):
    """What to render, and its bounds: seconds and characters per conversation, bytes beyond what the process takes when it is idle.

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
    body = msgspec.json.encode(content)
    return LENGTH.pack(len(body)) + body


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to whole groups of processes; this one ends when the server closes the socket
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=0) as server, server.makefile("rb") as frames:
        given = msgspec.json.decode(_next(frames), type=Template)
        template = ChatTemplate(*json.loads(given.text_and_tokens))  # compiled within the bounds, with the first conversation
        _bound_memory(given.memory)
        while body := _next(frames):
            signal.setitimer(signal.ITIMER_REAL, given.seconds)  # SIGALRM is left to the kernel, which ends the process
            answer = frame(_render(template, body, given.most))
            signal.setitimer(signal.ITIMER_REAL, 0)
            server.sendall(answer)


def _render(template: ChatTemplate, body: bytes, most: int) -> Rendered:
    try:
        asked = msgspec.json.decode(body, type=Conversation)
        return Rendered(template.render(asked.messages, asked.add_generation_prompt, asked.more, most))
    except TemplateRefusal as refusal:
        return Rendered(refusal=str(refusal)[:1000])
    except MemoryError:
        os._exit(ENDED_FOR_MEMORY)  # the server must see how it ended, and the socket close with it


def _next(frames: Any) -> bytes:
    """The next frame; nothing where the server has gone."""
    head = frames.read(LENGTH.size)
    return frames.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def _bound_memory(more: int) -> None:
    """Let the process take this much more; on systems that do not say what it takes now, of the heap alone."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (more + (64 << 20),) * 2)


if __name__ == "__main__":
    main()
