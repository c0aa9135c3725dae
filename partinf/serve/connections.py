"""HTTP/1.1 with bounds that uvicorn does not set: how many connections there are, how long one may take to say what it wants, and how long
to take what it is sent; and a short way for the body of a stream."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from partinf.serve.errors import unavailable

_TRANSPORT = "transport"  # the name of a connection's transport in the state of its requests


def bounded_protocol(max_connections: int, head_seconds: float) -> type[asyncio.Protocol]:
    """A protocol for `uvicorn.Config(http=…)`.

    A connection beyond the bound is answered with 503 and closed. One that has not sent a whole head in time is dropped; between two
    requests uvicorn's own keep-alive timeout counts besides.
    """

    class Bounded(H11Protocol):
        _refused = False
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            if len(self.connections) >= max_connections:
                self._refused = True
                transport.write(_refusal(max_connections))
                transport.close()
                return
            super().connection_made(transport)
            self.app_state = {**self.app_state, _TRANSPORT: transport}
            self._watch()

        def data_received(self, data: bytes) -> None:
            if not self._refused:
                super().data_received(data)
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if not self._refused:
                super().connection_lost(exc)
                self._unset_keepalive_if_required()  # uvicorn's own does it only for connections that end without an error
            self._forget()

        def _watch(self) -> None:
            """Run the clock while the client owes a head; more of it does not wind the clock back."""
            busy = self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]  # None before the first
            if busy:
                self._forget()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(head_seconds, self.transport.abort)

        def _forget(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Bounded


class Outlet:
    """Writes pieces of an answer's body to its connection, between ASGI's messages that begin and end an answer of unknown length.

    What a slow client does not take is kept, which the length of an answer bounds. One that has taken nothing for `stall_seconds` although
    there was something to take, or for up to twice as long, is gone: its connection is ended.
    """

    def __init__(self, scope: Scope, stall_seconds: float) -> None:
        self._transport: asyncio.Transport = scope["state"][_TRANSPORT]
        self._chunked = scope["http_version"] >= "1.1"  # as h11 frames a body of unknown length; before, it lasts as long as the connection
        self._stall_seconds = stall_seconds
        self._written = 0
        self._taken: int | None = None  # bytes, when the clock rang last; None if none were left then

    def __enter__(self) -> Outlet:
        self._wind()
        return self

    def __exit__(self, *error: object) -> None:
        self._clock.cancel()

    def write(self, body: bytes) -> None:
        if body and not self._transport.is_closing():  # an empty chunk would end the body
            framed = b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body
            self._written += len(framed)
            self._transport.write(framed)

    def _wind(self) -> None:
        self._clock = asyncio.get_running_loop().call_later(self._stall_seconds, self._ring)

    def _ring(self) -> None:
        left = self._transport.get_write_buffer_size()
        taken = self._written - left if left else None
        if left and taken == self._taken:
            self._transport.abort()
        self._taken = taken
        self._wind()


def _refusal(max_connections: int) -> bytes:
    error = unavailable(f"there are {max_connections} connections already", retry_after=1)
    body: bytes = msgspec.json.encode(error.content)
    head: dict[str, Any] = {"content-type": "application/json", "content-length": len(body), "connection": "close", **error.headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"HTTP/1.1 503 Service Unavailable\r\n{lines}\r\n".encode() + body
