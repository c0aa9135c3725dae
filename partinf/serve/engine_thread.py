"""One thread drives the engine; what it generates reaches the event loop once per iteration.

Everything else here runs in the event loop. A call to the loop per token would cost more than the token, so the events of an iteration
cross over together and wake only those requests that have any.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import traceback
from collections.abc import Callable, Sequence

from partinf.engine.engine import Engine
from partinf.engine.request import FinishReason, RequestOutput, SamplingParams, TokenEvent
from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.hosts import JobEnded

logger = logging.getLogger("partinf.serve")

Item = TokenEvent | RequestOutput


class Inbox:
    """What the engine has to say to one HTTP request, which may be several of the engine's: one per prompt.

    Attributes:
        ids: of the engine's requests, in the order of the prompts.
    """

    def __init__(self, ids: Sequence[str], num_outputs: int, close: Callable[[Inbox], None]) -> None:
        self.ids = tuple(ids)
        self._left = num_outputs
        self._close = close
        self._items: list[Item] = []
        self._place = {name: place for place, name in enumerate(ids)}
        self._listener: Callable[[list[Item]], None] | None = None

    @property
    def complete(self) -> bool:
        """Whether everything has come."""
        return not self._left

    def place(self, item: Item) -> int:
        """The number of the prompt that something is about."""
        return self._place[item.id if isinstance(item, RequestOutput) else item.request_id]

    def put(self, item: Item) -> None:
        """Keep this for the next `tell`."""
        self._items.append(item)
        self._left -= isinstance(item, RequestOutput)

    def tell(self) -> None:
        """Call the listener with what has come since the last time."""
        if self._listener is not None and self._items:
            items, self._items = self._items, []
            self._listener(items)

    def listen(self, listener: Callable[[list[Item]], None]) -> None:
        """Call this, which must not raise, in the event loop: now with what has come, and then once per iteration that has anything."""
        self._listener = listener
        self.tell()

    async def outputs(self) -> list[list[RequestOutput]]:
        """Wait for everything; the outputs per prompt, by sample."""
        found: list[list[RequestOutput]] = [[] for _ in self.ids]
        ended = asyncio.Event()

        def take(items: list[Item]) -> None:
            for item in items:
                if isinstance(item, RequestOutput):
                    found[self.place(item)].append(item)
            if self.complete:
                ended.set()

        self.listen(take)
        await ended.wait()
        return [sorted(outputs, key=lambda output: output.sample) for outputs in found]

    def close(self) -> None:
        """The client is gone: cancel what still runs."""
        self._listener = None
        self._close(self)


class EngineThread:
    """Drives an engine from one thread, for the event loop that made this object alone.

    Attributes:
        on_output: called in the event loop with every request that ended.
    """

    def __init__(self, engine: Engine, on_output: Callable[[RequestOutput], None] | None = None) -> None:
        self.engine = engine
        self.on_output = on_output
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._inboxes: dict[str, Inbox] = {}
        self._events: list[TokenEvent] = []
        self._work = threading.Event()
        self._stopping = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_requests(self) -> int:
        """Requests of the engine whose answers are awaited."""
        return len(self._inboxes)

    def submit(self, prompts: Sequence[Sequence[int] | str], params: SamplingParams, stream: bool) -> Inbox:
        """Queue one request per prompt, all of them or none.

        They are named by their number, because samples without a seed derive theirs from the engine's and the name.

        Args:
            stream: give out events in addition to the outputs at the end.

        Raises:
            InvalidInput: what is wrong with any of the prompts.
            Overloaded: the queue is full.
        """
        number = next(self._numbers)
        ids = [f"{number}-{place}" for place in range(len(prompts))]
        inbox = Inbox(ids, len(prompts) * params.n, self._close)
        offences: list[str] = []
        try:
            for name, prompt in zip(ids, prompts, strict=True):
                self._inboxes[name] = inbox  # before the engine's thread can see the request
                try:
                    self.engine.add_request(prompt, params, name, on_token=self._events.append if stream else None)
                except InvalidInput as error:
                    offences += error.offences
            raise_offences(offences)
        except BaseException:
            self._close(inbox)
            raise
        self._idle.clear()
        self._work.set()
        return inbox

    def cancel_all(self) -> None:
        """End every request that is in flight, and notify the waiting clients."""
        for name in list(self._inboxes):
            self.engine.cancel(name)
        self._work.set()

    async def idle(self) -> None:
        """Wait until no request is in flight."""
        await self._idle.wait()

    def stop(self) -> None:
        """Let `run` return after its iteration."""
        self._stopping = True
        self._work.set()

    def run(self) -> None:
        """The thread: iterations while there is work."""
        while not self._stopping:
            if not self.engine.has_work:
                self._work.wait()
                self._work.clear()
                continue
            outputs: list[RequestOutput] = []
            try:
                outputs = self.engine.step()
            except JobEnded:  # and with it part of the model
                raise
            except Exception as error:  # the engine has ended every request that it concerns; the next step returns them
                log_failure("an iteration failed", error)
            # The engine calls `append` in this thread, inside `step`.
            events = self._events.copy()
            self._events.clear()
            if events or outputs:
                self._loop.call_soon_threadsafe(self._hand_out, events, outputs)

    def _hand_out(self, events: list[TokenEvent], outputs: list[RequestOutput]) -> None:
        """All that an iteration brought, to all who wait for any of it, in one pass."""
        found: dict[Inbox, None] = {}
        for event in events:
            if (inbox := self._inboxes.get(event.request_id)) is not None:
                inbox.put(event)
                found[inbox] = None
        for output in outputs:
            if self.on_output is not None:
                self.on_output(output)
            if (inbox := self._inboxes.get(output.id)) is not None:
                inbox.put(output)
                found[inbox] = None
        for inbox in found:
            inbox.tell()

    def _close(self, inbox: Inbox) -> None:
        for name in inbox.ids:
            if self._inboxes.pop(name, None) is not None and self.engine.cancel(name):
                self._work.set()
        if not self._inboxes:
            self._idle.set()


def ended_well(output: RequestOutput | TokenEvent) -> bool:
    """Whether an answer came to its end."""
    return output.finish_reason not in (FinishReason.CANCELLED, FinishReason.FAILED)


def log_failure(what: str, error: BaseException) -> None:
    """Log where something broke, without the text of the exception: it may repeat what a client sent."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s: %s\n%s", what, type(error).__name__, frames.rstrip())
    logger.debug("%s", error)
