"""A response by server-sent events, and requests whose client goes away before they are answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from partinf.engine.request import RequestOutput, TokenEvent
from partinf.serve.answers import Answer
from partinf.serve.engine_thread import Inbox, ended_well
from partinf.serve.errors import ApiError, failure, unavailable

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. The request's body must have been read.

    Raises:
        ClientGone: the client left first; `work` is cancelled.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


class EventStream:
    """An ASGI response that sends the events of one request as they come.

    What a slow client does not take is kept, which the length of an answer bounds; one that takes nothing for `stall_seconds` is gone.
    """

    def __init__(self, answer: Answer, inbox: Inbox, num_prompts: int, include_usage: bool, stall_seconds: float) -> None:
        self._answer = answer
        self._inbox = inbox
        self._num_prompts = num_prompts
        self._include_usage = include_usage
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await unless_gone(receive, self._send_all(send))
        except ClientGone:
            pass
        except TimeoutError:
            scope.get("state", {}).get("abort", lambda: None)()
            await asyncio.sleep(0)  # for the connection to know
        finally:
            self._inbox.close()

    async def _send_all(self, send: Send) -> None:
        async for body in self._bodies():
            async with asyncio.timeout(self._stall_seconds):
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _bodies(self) -> AsyncIterator[bytes]:
        """Events, those of one iteration together."""
        opening = b"".join(map(_event, self._answer.opening()))
        if opening:
            yield opening
        outputs: list[list[RequestOutput]] = [[] for _ in range(self._num_prompts)]
        while items := await self._inbox.next():
            tokens: dict[tuple[int, int], list[TokenEvent]] = {}
            for prompt, item in items:
                if isinstance(item, RequestOutput):
                    outputs[prompt].append(item)
                elif ended_well(item):
                    tokens.setdefault((prompt, item.sample), []).append(item)
            parts = [self._answer.event(prompt, events) for (prompt, _), events in tokens.items()]
            body = b"".join(_event(part) for part in parts if part is not None)
            if not all(ended_well(output) for samples in outputs for output in samples):
                yield body + _event(broken_off([output for samples in outputs for output in samples]).content) + DONE
                return
            if body:
                yield body
        yield (_event(self._answer.closing(outputs)) if self._include_usage else b"") + DONE


def broken_off(outputs: list[RequestOutput]) -> ApiError:
    """Why there is no answer: something failed, or the server is on its way down."""
    if any(output.error is not None for output in outputs):
        return failure()
    return unavailable("the server is shutting down", retry_after=1)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
