"""HTTP/1.1 with bounds that uvicorn does not set: how many connections there are, and how long one may take to say what it wants."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from partinf.serve.errors import unavailable


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
            # Also for a request that must end its connection although the client takes nothing (`request.state.abort`).
            self.app_state = {**self.app_state, "abort": transport.abort}
            self._watch()

        def data_received(self, data: bytes) -> None:
            if not self._refused:
                super().data_received(data)
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if not self._refused:
                super().connection_lost(exc)
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


def _refusal(max_connections: int) -> bytes:
    error = unavailable(f"there are {max_connections} connections already", retry_after=1)
    body: bytes = msgspec.json.encode(error.content)
    head: dict[str, Any] = {"content-type": "application/json", "content-length": len(body), "connection": "close", **error.headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"HTTP/1.1 503 Service Unavailable\r\n{lines}\r\n".encode() + body
