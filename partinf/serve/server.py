"""The server's life: listen, load the model, answer, drain, stop.

The port is open before the model is loaded, so that a port that is taken is known at once and `/health` can say that it is not ready.
One thread loads the model and then drives the engine. The first SIGTERM or SIGINT lets what is in flight come to its end, within a bound,
while new requests are answered with 503; the second ends the process.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn

from partinf.checkpoint.tokenizer import Tokenizer
from partinf.engine.admission import RequestCheck
from partinf.engine.engine import Engine
from partinf.foundation.errors import InvalidInput
from partinf.serve.app import Front, Running
from partinf.serve.bodies import Bounds
from partinf.serve.chat_template import ChatTemplate
from partinf.serve.connections import bounded_protocol
from partinf.serve.conversations import Conversations
from partinf.serve.engine_thread import EngineThread, log_failure
from partinf.serve.prompts import Served
from partinf.serve.structures import Structures
from partinf.serve.template_processes import TemplateBounds
from partinf.serve.tool_calls import ToolFormat

_IDLE_SECONDS = 30  # that a connection is held open between two requests
_CLOSING_SECONDS = 2.0  # for connections to close once their answers are sent


@dataclass(frozen=True)
class Loaded:
    """A warm engine, and what goes with its model.

    Attributes:
        note: a line about the warm-up.
    """

    engine: Engine
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    note: str = ""


@dataclass(frozen=True)
class Options:
    """How to serve.

    Attributes:
        names: by which the model may be requested; answers bear the first. api_keys: any of them opens /v1; none leaves it open.
        max_connections: open at once. drain_seconds: for requests in flight when the server gets a signal to stop.
        head_seconds: for a client to say what it wants.
        access_log: a line per request, with its path and nothing of its body.
        tool_format: in which the model writes calls of tools, where its template does not tell.
        cors_origins: of pages that may ask from browsers, or `*` for all; none unless given.
    """

    names: Sequence[str]
    api_keys: Sequence[str] = ()
    bounds: Bounds = field(default_factory=Bounds)
    template_bounds: TemplateBounds = field(default_factory=TemplateBounds)
    max_connections: int = 1024
    drain_seconds: float = 20.0
    head_seconds: float = 10.0
    access_log: bool = False
    tool_format: ToolFormat | None = None
    cors_origins: Sequence[str] = ()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        InvalidInput: the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise InvalidInput(f"--host {host} --port {port}: {error}") from error


def serve(listener: socket.socket, load: Callable[[], Loaded], options: Options) -> bool:
    """Serve until a signal to stop; returns whether the engine's thread has come to its end. Signals are handled if this is the main
    thread.

    Raises:
        Exception: what `load` raised.
    """
    server = Server(load, options)
    server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure
    server.thread.join(_CLOSING_SECONDS)
    return not server.thread.is_alive()


class Server(uvicorn.Server):
    """A uvicorn server that loads a model behind its open port, and drains before it closes it.

    Attributes:
        front: the application. thread: loads the model and drives the engine. failure: what ended it early, if anything did.
    """

    def __init__(self, load: Callable[[], Loaded], options: Options) -> None:
        self.front = Front(options.names, options.api_keys, options.bounds, options.cors_origins)
        super().__init__(
            uvicorn.Config(
                self.front.app,
                http=bounded_protocol(options.max_connections, options.head_seconds, options.bounds.stall_seconds),
                ws="none",
                lifespan="off",
                log_level="info" if options.access_log else "warning",
                access_log=options.access_log,
                server_header=False,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=int(_CLOSING_SECONDS),
            )
        )
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._drive, name="partinf-engine", daemon=True)
        self._load = load
        self._options = options
        self._loop: asyncio.AbstractEventLoop | None = None
        self._conversations: Conversations | None = None
        self._structures: Structures | None = None
        self._signalled = False
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or ():
            host, port, *_ = listener.getsockname()
            say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}, loading the model")
        self.thread.start()

    def _drive(self) -> None:
        """The engine's thread: load, then run iterations."""
        try:
            loaded = self._load()
            assert self._loop is not None
            thread = asyncio.run_coroutine_threadsafe(self._open(loaded), self._loop).result()
            thread.run()
        except BaseException as error:
            if self.front.draining:  # no client waits for the model any more
                return
            self.failure = error
            if self.front.running is not None:
                log_failure("the engine's thread ended", error)
            self._tell(self._give_up)

    async def _open(self, loaded: Loaded) -> EngineThread:
        """The model is warm: take requests."""
        thread = EngineThread(loaded.engine)
        if self.front.draining:
            thread.stop()
        limits, tokenizer = loaded.engine.limits, loaded.tokenizer
        template = loaded.chat_template
        self._conversations = (
            None if template is None else Conversations(template, self._options.template_bounds, self._options.tool_format)
        )
        self._structures = Structures(limits, tokenizer)
        check = RequestCheck(limits, tokenizer, seed=0, eos_ids=loaded.engine.eos_ids)
        served = Served(tuple(self._options.names), limits, check, tokenizer, self._conversations, self._structures)
        self.front.running = Running.of(served, thread)
        say(f"ready{f': {loaded.note}' if loaded.note else ''}")
        return thread

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._conversations is not None:
            self._conversations.close()
        if self._structures is not None:
            self._structures.close()
        await super().shutdown(sockets)

    def _tell(self, what: Callable[[], Any]) -> None:
        if self._loop is None:
            self.should_exit = True
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(what)

    def _give_up(self) -> None:
        self.front.draining = self.should_exit = True
        if self.front.running is not None:
            self.front.running.engine.cancel_all()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            sys.stderr.flush()
            os._exit(128 + sig)
        self._signalled = True
        self.stop()

    def stop(self) -> None:
        """Take nothing new, wait for what is in flight, then end `run`; from any thread, and does not wait for it."""
        self._tell(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        self.front.draining = True
        running = self.front.running
        if running is not None:
            engine = running.engine
            say(f"draining: {engine.num_requests} requests in flight, at most {self._options.drain_seconds:g} s (again to stop at once)")
            try:
                async with asyncio.timeout(self._options.drain_seconds):
                    await engine.idle()
            except TimeoutError:
                say(f"time is up: cancelling {engine.num_requests} requests")
                engine.cancel_all()
                await asyncio.wait([asyncio.ensure_future(engine.idle())], timeout=_CLOSING_SECONDS)
            engine.stop()
        self.should_exit = True


def say(text: str) -> None:
    print(f"partinf serve: {text}", file=sys.stderr, flush=True)
