"""One engine over several processes: the first schedules and serves, the others run the same steps on their devices.

jax wants every process to start every program, in one order. So the engine, its clients and its clock live in process 0 alone, whose runner
sends each step to the others before it starts it itself; a step is a few hundred bytes per request. Nothing comes back: what is sampled is
the same on every device. The connections are between the processes of one job and are trusted as jax's own coordinator is.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from partinf.engine.runner import Runner, RunnerLimits
from partinf.engine.step import Step, StepOutput
from partinf.errors import InvalidInput, raise_offences

_LENGTH = struct.Struct("!I")
_RESET = b""
_IN_FLIGHT = 8  # steps that a follower starts before it waits for the oldest; more than any lag of the leader's


@dataclass(frozen=True)
class Processes:
    """This process among those of a job.

    Attributes:
        host, port: where process 0 has jax's coordinator; steps go over the port after it.
        count, index: how many there are, and which this is; process 0 serves.
    """

    host: str = ""
    port: int = 0
    count: int = 1
    index: int = 0

    @classmethod
    def of(cls, coordinator: str | None, count: int | None, index: int | None) -> Processes:
        """
        Args:
            coordinator: HOST:PORT, or None for a single process.

        Raises:
            InvalidInput: what is missing or wrong, in the words of the command line.
        """
        given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
        if all(value is None for value in given.values()):
            return cls()
        offences = [f"{flag} is missing: a job of several processes needs {', '.join(given)}" for flag, v in given.items() if v is None]
        host, _, port = (coordinator or "").rpartition(":")
        if coordinator is not None and (not host or not port.isdigit() or not 0 < int(port) < 65535):
            offences.append(f"--coordinator {coordinator}: HOST:PORT is needed; the port after it must be free too")
        if count is not None and count < 1:
            offences.append(f"--num-processes {count}; it must be at least 1")
        if count is not None and index is not None and not 0 <= index < max(1, count):
            offences.append(f"--process-id {index}; valid: 0..{count - 1}")
        raise_offences(offences)
        assert count is not None
        assert index is not None
        return cls(host.strip("[]"), int(port), count, index)

    def listen(self) -> socket.socket:
        """Where process 0 waits for the others.

        Raises:
            InvalidInput: the address cannot be had.
        """
        try:
            return socket.create_server((self.host, self.port + 1), family=socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        except OSError as error:
            raise InvalidInput(f"--coordinator: port {self.port + 1} of {self.host}: {error}") from error

    def accept(self, listener: socket.socket, seconds: float) -> list[socket.socket]:
        """The connections of all others; they come when their programs are compiled.

        Raises:
            TimeoutError: not all of them came in time.
        """
        deadline, found = time.monotonic() + seconds, list[socket.socket]()
        while len(found) < self.count - 1:
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            connection, _ = listener.accept()
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            found.append(connection)
        return found

    def connect(self, seconds: float) -> socket.socket:
        """The connection to process 0, which may not listen yet.

        Raises:
            OSError: it could not be had in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                connection = socket.create_connection((self.host, self.port + 1), timeout=5)
                connection.settimeout(None)
                return connection
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


class FollowerLost(BaseException):
    """Another process of the job is gone, and with it part of the model: this ends the server, not a request."""


class Leader:
    """A runner whose every step runs in the other processes too."""

    def __init__(self, runner: Runner, followers: Sequence[socket.socket]) -> None:
        self._runner = runner
        self._followers = list(followers)
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def limits(self) -> RunnerLimits:
        return self._runner.limits

    def submit(self, step: Step) -> None:
        """
        Raises:
            FollowerLost: a connection broke.
        """
        self._send(self._encoder.encode(step))
        self._runner.submit(step)

    def collect(self) -> StepOutput:
        return self._runner.collect()

    def reset(self) -> None:
        with contextlib.suppress(FollowerLost):  # the step that found out has said so
            self._send(_RESET)
        self._runner.reset()

    def close(self) -> None:
        """Let the others end."""
        for follower in self._followers:
            follower.close()

    def _send(self, message: bytes) -> None:
        framed = _LENGTH.pack(len(message)) + message
        try:
            for follower in self._followers:
                follower.sendall(framed)
        except OSError as error:
            raise FollowerLost from error


def follow(runner: Runner, leader: socket.socket) -> None:
    """Run the leader's steps until it closes the connection."""
    decoder = msgspec.msgpack.Decoder(Step)
    in_flight = 0
    with leader, leader.makefile("rb") as stream:
        while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
            message = stream.read(_LENGTH.unpack(head)[0])
            if message == _RESET:
                runner.reset()
                in_flight = 0
                continue
            runner.submit(decoder.decode(message))
            in_flight += 1
            if in_flight == _IN_FLIGHT:
                runner.collect()
                in_flight -= 1
