"""Renders chat templates in processes of their own, for one server.

A template is a program of others, and the messages that it reads are a client's. In the server it would hold the interpreter for as long
as it likes, in a thread as well: an endless loop, a power of thousands of digits or a text of a gigabyte blocks every request, and no
    thread
can be ended. A process can. There are at most a few, each started when it is needed first, and again after one had to be ended; they import
jinja and nothing of jax, and they end when the server does, however that ends.
"""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import dataclass
from typing import Any

import msgspec

from partinf.foundation import bounded_process
from partinf.foundation.bounded_process import LENGTH
from partinf.foundation.errors import Overloaded
from partinf.serve.chat_template import MOST_CHARACTERS, ChatTemplate, TemplateRefusal
from partinf.serve.template_process import ENDED_FOR_MEMORY, Conversation, Rendered, Template, frame

_PATIENCE = 10  # times as long as its seconds may a conversation take where others want the core
_STARTING_SECONDS = 20.0  # for a process to import what it needs, on a machine that is busy


@dataclass(frozen=True)
class TemplateBounds:
    """What rendering may take.

    Attributes:
        seconds: of a core, for one conversation. memory: bytes of one process, beyond what it takes when idle. characters: of a prompt.
        processes: that render at the same time. waiting_seconds: for one of them to be free.
    """

    seconds: float = 3.0
    memory: int = 256 << 20
    characters: int = MOST_CHARACTERS
    processes: int = 2
    waiting_seconds: float = 10.0


class TemplateProcesses:
    """One template's renderers; used from one event loop."""

    def __init__(self, template: ChatTemplate, bounds: TemplateBounds | None = None) -> None:
        self.bounds = bounds or TemplateBounds()
        text_and_tokens = json.dumps([template.source, template.tokens])
        self._template = Template(text_and_tokens, self.bounds.seconds, self.bounds.characters, self.bounds.memory)
        self._free = asyncio.Semaphore(self.bounds.processes)
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()

    def read(self, messages: list[dict[str, Any]], add_generation_prompt: bool, more: dict[str, Any]) -> bytes:
        """The variables of a template, as `render` takes them; from any thread."""
        return frame(Conversation(messages, add_generation_prompt, more))

    async def render(self, conversation: bytes) -> str:
        """As `ChatTemplate.render`, within bounds.

        Raises:
            TemplateRefusal: as there, or for having taken too much time or memory.
            Overloaded: no process became free in time.
        """
        try:
            async with asyncio.timeout(self.bounds.waiting_seconds):
                await self._free.acquire()
        except TimeoutError:
            raise Overloaded("too many conversations wait for the chat template", retry_after=self.bounds.seconds) from None
        process = None
        try:
            process = self._idle.pop() if self._idle else _Process(self._template)
            self._busy.add(process)
            rendered = await process.ask(conversation)
            self._idle.append(process)
        except BaseException:
            if process is not None:
                process.kill()
            raise
        finally:
            if process is not None:
                self._busy.discard(process)
            self._free.release()
        if rendered.text is None:
            raise TemplateRefusal(rendered.refusal or "")
        return rendered.text

    def close(self) -> None:
        """End all processes, in the middle of what they do; waiting requests learn that they ended."""
        for process in self._busy:
            process.interrupt()
        while self._idle:
            self._idle.pop().kill()


class _Process:
    """One process and the socket to it. Whatever goes wrong with it, it is not used again."""

    def __init__(self, template: Template) -> None:
        """Starts it, which does not wait until it has come up."""
        self._child, self._socket = bounded_process.start("partinf.serve.template_process")
        self._socket.setblocking(False)
        self._seconds = template.seconds
        self._unsent = frame(template)

    async def ask(self, request: bytes) -> Rendered:
        """The answer to one frame.

        Raises:
            TemplateRefusal: the process ended instead.
        """
        # The kernel ends the process in time; this is for one that does not run at all.
        most = _PATIENCE * self._seconds + (_STARTING_SECONDS if self._unsent else 0.0)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(most):
                await loop.sock_sendall(self._socket, self._unsent + request)
                self._unsent = b""
                (length,) = LENGTH.unpack(await self._read(LENGTH.size))
                return msgspec.json.decode(await self._read(length), type=Rendered)
        except (OSError, EOFError):  # TimeoutError is among them
            raise TemplateRefusal(self._why(self.kill())) from None

    async def _read(self, count: int) -> bytes:
        loop, parts = asyncio.get_running_loop(), bytearray()
        while len(parts) < count:
            part = await loop.sock_recv(self._socket, min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def _why(self, code: int) -> str:
        """What ended the process, for the client."""
        if code in (-signal.SIGPROF, -signal.SIGKILL):
            return f"the model's chat template takes more than {self._seconds:g} s for these messages"
        if code == ENDED_FOR_MEMORY:
            return "the model's chat template takes too much memory for these messages"
        return "the model's chat template cannot render these messages (its process ended)"

    def interrupt(self) -> None:
        """End what it does; `ask` sees that."""
        self._child.kill()

    def kill(self) -> int:
        """End it, and say how it ended; nothing of it is left."""
        code = bounded_process.end(self._child)
        self._socket.close()
        return code
