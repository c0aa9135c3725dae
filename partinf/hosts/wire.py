"""Messages between the processes of a job, over TCP: a kind, a length, and as many bytes.

A connection begins with a greeting that holds the job's token, which only its processes know; one without it is closed.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from partinf.foundation.errors import InvalidInput

TOKEN_BYTES = 16
_HEAD = struct.Struct("!BI")
_GREETING = struct.Struct(f"!{TOKEN_BYTES}sHH64s")  # token, index, purpose, name
_MAX_BYTES = 1 << 30


class MessageKind(IntEnum):
    """BEAT: a sign of life. FAIL: the job ends, and why. BYE: this side is done. INPUTS: those of an iteration. VALUE: what `Group.share`
    was given."""

    BEAT = 0
    FAIL = 1
    BYE = 2
    INPUTS = 3
    VALUE = 4


class Purpose(IntEnum):
    """What a connection is for: INPUTS carries what the first process broadcasts, WATCH the watchdogs' messages in both directions."""

    INPUTS = 0
    WATCH = 1


class Link:
    """A connection to another process. Sending and receiving may happen in different threads, each in one at a time."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._stream = connection.makefile("rb")

    def send(self, kind: MessageKind, payload: bytes = b"") -> None:
        """
        Raises:
            OSError: the connection broke.
        """
        self._socket.sendall(_HEAD.pack(kind, len(payload)) + payload)

    def receive(self) -> tuple[MessageKind, bytes]:
        """
        Raises:
            OSError: the connection broke (EOFError: it was closed), or nothing came in time.
        """
        kind, length = _HEAD.unpack(self._read(_HEAD.size))
        if length > _MAX_BYTES:
            raise OSError(f"a message of {length} bytes")
        return MessageKind(kind), self._read(length)

    def give_up_after(self, seconds: float | None) -> None:
        """Let `receive` raise TimeoutError when nothing comes for so long."""
        self._socket.settimeout(seconds)

    def shut(self) -> None:
        """End the connection; threads that wait in it wake up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut()
        with contextlib.suppress(OSError):
            self._stream.close()
        self._socket.close()

    def _read(self, count: int) -> bytes:
        content = self._stream.read(count) if count else b""
        if len(content) < count:
            raise EOFError("the connection was closed")
        return content


@dataclass(frozen=True)
class Door:
    """Where the first process listens, and the token that it asks for."""

    listener: socket.socket
    token: bytes

    @classmethod
    def open(cls, host: str = "") -> Door:
        """On a free port of an address, or of all.

        Raises:
            InvalidInput: the address is none of this machine's.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return cls(socket.create_server((host, 0), family=family, backlog=1024), secrets.token_bytes(TOKEN_BYTES))
        except OSError as error:
            raise InvalidInput(f"coordinator {host}: {error.strerror or error}; it must be an address of process 0") from error

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def accept(self, count: int, seconds: float) -> dict[int, tuple[str, dict[Purpose, Link]]]:
        """The name and the two links of each of the other processes, by index.

        Args:
            count: processes of the job, this one included.

        Raises:
            TimeoutError: some did not come; they are named.
        """
        deadline = time.monotonic() + seconds
        found: dict[int, tuple[str, dict[Purpose, Link]]] = {}
        while sum(len(links) for _, links in found.values()) < 2 * (count - 1):
            self.listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = self.listener.accept()
            except TimeoutError:
                absent = [index for index in range(1, count) if len(found.get(index, ("", {}))[1]) < 2]
                raise TimeoutError(f"processes {', '.join(map(str, absent))} of {count} did not connect within {seconds:.0f} s") from None
            greeted = self._greet(connection)
            if greeted is None or not 0 < greeted[0] < count:
                connection.close()
                continue
            index, purpose, name = greeted
            found.setdefault(index, (name, {}))[1][purpose] = Link(connection)
        return found

    def _greet(self, connection: socket.socket) -> tuple[int, Purpose, str] | None:
        connection.settimeout(5.0)
        try:
            greeting = b""
            while len(greeting) < _GREETING.size:
                part = connection.recv(_GREETING.size - len(greeting))
                if not part:
                    return None
                greeting += part
            token, index, purpose, name = _GREETING.unpack(greeting)
            if not secrets.compare_digest(token, self.token):
                return None
            return index, Purpose(purpose), name.rstrip(b"\0").decode(errors="replace")
        except (OSError, ValueError):
            return None


def connect(addresses: Sequence[tuple[str, int]], token: bytes, index: int, name: str, seconds: float) -> dict[Purpose, Link]:
    """The two links to the first process, by the first of its addresses that answers.

    Raises:
        OSError: none did in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        failure: OSError | None = None
        for address in addresses:
            connections: list[socket.socket] = []
            try:
                for purpose in Purpose:
                    connections.append(socket.create_connection(address, timeout=5))
                    connections[-1].sendall(_GREETING.pack(token, index, purpose, name.encode()[:64]))
                return dict(zip(Purpose, map(Link, connections), strict=True))
            except OSError as error:
                failure = error
                for connection in connections:
                    connection.close()
        if failure is not None and time.monotonic() > deadline:
            raise failure
        time.sleep(0.2)


def own_addresses(hint: str = "") -> list[str]:
    """Addresses under which other machines may find this one, the likeliest first."""
    found = [hint] if hint else []
    with contextlib.suppress(OSError):
        found += [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; tells the address that packets to the outside bear
        found.append(probe.getsockname()[0])
    return list(dict.fromkeys([*found, "127.0.0.1"]))
