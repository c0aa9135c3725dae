"""Reading the bodies of requests, bounded in size, in time, and in what all of them take together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import Request

from partinf.serve.errors import ApiError, Offence, unavailable

_DISCARDED = 4  # times the largest body that is read and thrown away before a body that is too large is refused


@dataclass(frozen=True)
class Bounds:
    """What clients may take of the server.

    Attributes:
        body_bytes: of a request. all_bytes: of all requests that are being read. body_seconds: until a body has arrived.
        stall_seconds: for a client to take nothing of its answer.
    """

    body_bytes: int = 8 << 20
    all_bytes: int = 256 << 20
    body_seconds: float = 30.0
    stall_seconds: float = 60.0


class BodyReader:
    """Reads bodies for one server."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._held = 0  # bytes of bodies that have begun to arrive

    async def read(self, request: Request) -> bytes:
        """A body of JSON.

        Raises:
            ApiError: 408, 413, 415, or 503 when too much is being read already.
        """
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise ApiError(415, [Offence(f"the body is {media[:60] or 'of no type'}; application/json is needed")], code="not_json")
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._bounds.body_seconds):
                await self._collect(request, parts)
        except TimeoutError:
            raise ApiError(408, [Offence("the body did not arrive in time")], code="too_slow", connection="close") from None
        finally:
            self._held -= sum(map(len, parts))
        return b"".join(parts)

    async def _collect(self, request: Request, parts: list[bytes]) -> None:
        most, size = self._bounds.body_bytes, 0
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:18]) > most * _DISCARDED:
            raise self._too_large()
        async for part in request.stream():
            size += len(part)
            if size <= most:
                parts.append(part)
                self._held += len(part)
            elif size > most * _DISCARDED:
                break
            if self._held > self._bounds.all_bytes:
                raise unavailable("too many large requests at once", retry_after=1)
        if size > most:  # refused only now, because most clients read an answer when all they had to say was taken
            raise self._too_large()

    def _too_large(self) -> ApiError:
        message = f"the body is too large; at most {self._bounds.body_bytes} bytes"
        return ApiError(413, [Offence(message)], code="too_large", connection="close")
