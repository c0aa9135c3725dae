"""A response by server-sent events, and requests whose client goes away before they are answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from partinf.engine.request import RequestOutput
from partinf.foundation.errors import NotFinite
from partinf.serve.answers import Answer
from partinf.serve.connections import body_writer
from partinf.serve.engine_thread import Inbox, Item, ended_well, log_failure
from partinf.serve.errors import ApiError, failure, unavailable
from partinf.serve.request_ids import log_refusal

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class ClientGone(Exception):
    """The client no longer waits for the answer."""


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

    It begins and ends as ASGI has it. The events between go straight to the connection, in the call that brings those of an iteration to
    the event loop: waking a task for them and sending an ASGI message costs several times what they do.
    """

    def __init__(self, answer: Answer, inbox: Inbox, num_prompts: int, include_usage: bool) -> None:
        self._answer = answer
        self._inbox = inbox
        self._outputs: list[list[RequestOutput]] = [[] for _ in range(num_prompts)]
        self._include_usage = include_usage
        self._scope: Scope = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await unless_gone(receive, self._send_all(body_writer(scope), send))
        except ClientGone:
            pass
        finally:
            self._inbox.close()

    async def _send_all(self, write: Callable[[bytes], None], send: Send) -> None:
        ended = asyncio.Event()

        def take(items: Sequence[Item]) -> None:
            if not ended.is_set():
                try:
                    body, last = self._body(items)
                except Exception as error:
                    log_failure("events could not be written", error)
                    body, last = _event(failure().content) + DONE, True
                write(body)
                if last:
                    ended.set()

        write(b"".join(map(_event, self._answer.opening())))
        self._inbox.listen(take)
        await ended.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _body(self, items: Sequence[Item]) -> tuple[bytes, bool]:
        """The events of what an iteration brought, one per token; and whether they are the last."""
        parts, broken = [], False
        for item in items:
            prompt = self._inbox.place(item)
            if isinstance(item, RequestOutput):
                self._outputs[prompt].append(item)
                broken = broken or not ended_well(item)
            elif ended_well(item) and (event := self._answer.event(prompt, item)) is not None:
                parts.append(_event(event))
        if broken:
            error = broken_off([output for samples in self._outputs for output in samples])
            log_refusal(self._scope, error)
            parts += [_event(error.content), DONE]
        elif self._inbox.complete:
            parts += [_event(self._answer.closing(self._outputs)) if self._include_usage else b"", DONE]
        return b"".join(parts), broken or self._inbox.complete


def broken_off(outputs: Sequence[RequestOutput]) -> ApiError:
    """Why there is no answer: something failed, or the server is on its way down."""
    for output in outputs:
        if output.error is not None:
            return failure(str(output.error) if isinstance(output.error, NotFinite) else None)
    return unavailable("the server is shutting down", retry_after=1)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
