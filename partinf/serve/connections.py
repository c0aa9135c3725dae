"""HTTP/1.1 with bounds that uvicorn does not set: how many connections there are, how long one may take to say what it wants and to take
its answer; and a short way out for streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from partinf.serve.errors import unavailable
from partinf.serve.request_ids import HEADER, log_reason, new_id

_OUTLET = "outlet"  # its name in the state of a connection's requests


class Outlet:
    """Writes pieces of answers to one connection, and ends it when the client takes nothing.

    What a slow client leaves is buffered, bounded by the length of an answer. One that takes nothing for `stall_seconds`, or for up to
    twice as long, while much is buffered for it is gone.
    """

    def __init__(self, transport: asyncio.Transport, stall_seconds: float) -> None:
        self._transport = transport
        self._stall_seconds = stall_seconds
        self._written = 0
        self._taken = 0  # of what was written, when the clock was wound last
        self._clock: asyncio.TimerHandle | None = None

    def write(self, piece: bytes) -> None:
        if not self._transport.is_closing():
            self._written += len(piece)
            self._transport.write(piece)

    def write_chunk(self, piece: bytes) -> None:
        if piece:  # an empty chunk would end the body
            self.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def wind(self) -> None:
        """Much is buffered: see whether it gets less."""
        self._taken = self._written - self._transport.get_write_buffer_size()
        self._clock = asyncio.get_running_loop().call_later(self._stall_seconds, self._ring)

    def stop(self) -> None:
        """Little is buffered."""
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _ring(self) -> None:
        before = self._taken
        self.wind()
        if self._taken == before:
            self._transport.abort()


def body_writer(scope: Scope) -> Callable[[bytes], None]:
    """What writes pieces of an answer's body at once, between the messages of ASGI that begin and end an answer of unknown length.

    They are framed as h11 does it: as chunks, or, for clients that do not know these, not at all.
    """
    outlet: Outlet = scope["state"][_OUTLET]
    return outlet.write_chunk if scope["http_version"] >= "1.1" else outlet.write


def bounded_protocol(max_connections: int, head_seconds: float, stall_seconds: float) -> type[asyncio.Protocol]:
    """A protocol for `uvicorn.Config(http=…)`.

    A connection beyond the bound is answered with 503 and closed. One that has not sent a whole head in time is dropped; between two
    requests uvicorn's own keep-alive timeout counts besides. For `stall_seconds` see `Outlet`.
    """

    class Bounded(H11Protocol):
        _refused = False
        _deadline: asyncio.TimerHandle | None = None
        _outlet: Outlet

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            if len(self.connections) >= max_connections:
                self._refused = True
                transport.write(_refusal(max_connections))
                transport.close()
                return
            super().connection_made(transport)
            self._outlet = Outlet(transport, stall_seconds)
            self.app_state = {**self.app_state, _OUTLET: self._outlet}
            self._watch()

        def data_received(self, data: bytes) -> None:
            if not self._refused:
                super().data_received(data)
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if not self._refused:
                super().connection_lost(exc)
                self._unset_keepalive_if_required()  # uvicorn's own does it only for connections that end without an error
                self._outlet.stop()
            self._forget()

        def pause_writing(self) -> None:
            if not self._refused:
                super().pause_writing()
                self._outlet.wind()

        def resume_writing(self) -> None:
            if not self._refused:
                super().resume_writing()
                self._outlet.stop()

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


def _refusal(max_connections: int) -> bytes:
    error, name = unavailable(f"there are {max_connections} connections already", retry_after=1), new_id()
    log_reason(name, "a connection", error)
    body: bytes = msgspec.json.encode(error.content)
    head: dict[str, Any] = {
        "content-type": "application/json",
        "content-length": len(body),
        "connection": "close",
        HEADER: name,
        **error.headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"HTTP/1.1 503 Service Unavailable\r\n{lines}\r\n".encode() + body
