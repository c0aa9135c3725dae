"""Every request has an id: the client's own `x-request-id`, or one that is made. It comes back with every answer, and is in the log
with the reason wherever a request is refused.

An answer says to its client what is wrong in the client's own words; the log says it without them, so that it holds nothing of a prompt.
"""

from __future__ import annotations

import logging
import re
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from partinf.serve.errors import ApiError

logger = logging.getLogger("partinf.serve")

HEADER = "x-request-id"
_KEY = "partinf.request_id"  # in an ASGI scope
_NAME = HEADER.encode()
_FINE = re.compile(rb"[!-~]{1,128}")  # may stand in a header and in a line of the log
_MOST = 500  # characters of a reason in the log


class RequestIds:
    """ASGI middleware that gives each request its id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given: bytes = next((value for name, value in scope["headers"] if name == _NAME), b"")
        own = given if _FINE.fullmatch(given) else new_id().encode()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (_NAME, own)]}
            await send(message)

        await self._app({**scope, _KEY: own.decode()}, receive, answer)


def new_id() -> str:
    """For a request that brings none."""
    return uuid.uuid4().hex


def log_refusal(scope: dict[str, Any] | Scope, error: ApiError) -> None:
    """One line: which request, and why it has no answer."""
    log_reason(scope.get(_KEY, "-"), f"{scope['method']} {scope['path'][:100]}", error)


def log_reason(request_id: str, what: str, error: ApiError) -> None:
    """The same, for what is no request yet."""
    reason = "".join(character if character.isprintable() else "?" for character in f"{what}: {error.reason}"[:_MOST])
    logger.warning("request %s refused with %d: %s", request_id, error.status, reason)
