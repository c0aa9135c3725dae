"""Tokens of one request as they come, for `for` and for `async for`, and the thread that drives the engine for the latter."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from partinf.engine.request import FinishReason, TokenEvent


class RequestFailed(RuntimeError):
    """A request ended because something went wrong while it ran; the cause is chained."""


class Driver:
    """Runs iterations: in the calling thread, or in one background thread for all async streams, which lives while there is work."""

    def __init__(self, advance: Callable[[], None], pending: Callable[[], bool]) -> None:
        self.advance = advance
        self._pending = pending
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ensure_running(self) -> None:
        """Start the background thread unless it runs. It sees all work that was added before this call."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="partinf-engine", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._pending():
                    self._thread = None
                    return
            try:
                self.advance()
            except Exception:  # the engine has ended every request that it concerns, and reported it to each of them
                continue


class RequestStream:
    """The `TokenEvent`s of one request, in order, the last of each sample with a finish reason. Iterate once, with `for` or `async for`.

    `for` runs the engine's iterations itself, others' requests included; any number of `async for` share the background thread.
    Leaving the loop early, or cancelling the task that runs it, cancels the request. A request that failed raises `RequestFailed`.

    Attributes:
        id: the request's id, as `Engine.cancel` takes it.
    """

    def __init__(self, request_id: str, driver: Driver, cancel: Callable[[str], bool], num_samples: int = 1) -> None:
        self.id = request_id
        self._unfinished = num_samples
        self._driver = driver
        self._cancel = cancel
        self._events: deque[TokenEvent] = deque()
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None

    def receive(self, event: TokenEvent) -> None:
        """Called by the engine, from whichever thread runs the iteration."""
        self._events.append(event)
        if self._loop is not None and self._wake is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    def __iter__(self) -> Iterator[TokenEvent]:
        try:
            while not self._ended:
                while not self._events:
                    self._driver.advance()
                yield self._next()
        finally:
            self._close()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        try:
            while not self._ended:
                if self._events:
                    yield self._next()
                    continue
                self._driver.ensure_running()
                await self._wake.wait()
                self._wake.clear()
        finally:
            self._close()

    def _next(self) -> TokenEvent:
        event = self._events.popleft()
        self._unfinished -= event.finish_reason is not None
        self._ended = not self._unfinished
        if event.finish_reason is FinishReason.FAILED:
            raise RequestFailed(f"request {self.id} failed: {event.error}") from event.error
        return event

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._cancel(self.id)
