"""The processes of a job as one: what the first broadcasts, what the others do with it, and how all of them end."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from partinf.engine.engine import Engine
from partinf.engine.replicas import IterationInputs
from partinf.engine.request import Request
from partinf.engine.runner import Runner, RunnerLimits
from partinf.engine.step import Step, StepOutput
from partinf.foundation.errors import InvalidInput
from partinf.hosts.watch import Bounds, Watch, end_process
from partinf.hosts.wire import Link, MessageKind, Purpose

_REASON_SECONDS = 1.0  # for the watchdog to find out why something broke here


class JobEnded(RuntimeError):
    """A process of the job died, stalled, failed or disagreed, which the message names; this process ends shortly."""


class Group:
    """The processes of a job, from inside one of them; `partinf.engine.replicas.Replicas` for its engine.

    Every process makes the same calls in the same order: `share` and `agree` while it sets up, then `follow`, or as the first process
    whatever it likes with its engine, and `close`. A group of one process has no others to send to and nothing to watch.

    Attributes:
        index, count: this process and how many there are. name: this process, for people.
    """

    def __init__(
        self,
        index: int,
        count: int,
        name: str,
        peers: Mapping[int, tuple[str, Mapping[Purpose, Link]]],
        bounds: Bounds | None = None,
        end: Callable[[], None] = end_process,
    ) -> None:
        """
        Args:
            peers: names and links: of every other process for the first, of the first alone for the others.
            bounds: how long to wait for others. end: ends this process when the job has failed.
        """
        self.index, self.count, self.name = index, count, name
        self._input_links = [links[Purpose.INPUTS] for _, links in peers.values()]
        self._closed = False
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(IterationInputs)
        watched = {other: (called, links[Purpose.WATCH]) for other, (called, links) in peers.items()}
        self._watch = Watch(name, watched, bounds or Bounds(), leads=self.leads, on_failure=self._wake, end=end)
        self._watch.start()

    @property
    def leads(self) -> bool:
        return self.index == 0

    @property
    def replicas(self) -> Group | None:
        """What an engine takes as its replicas: nothing where this process is alone, whose engine outlives an error of its runner."""
        return self if self.count > 1 else None

    # Setting up.

    def share(self, value: Any) -> Any:
        """The first process's value in every process: of numbers, text, lists and dictionaries.

        Raises:
            JobEnded: another process has ended.
        """
        if self.leads:
            self._send(MessageKind.VALUE, self._encoder.encode(value))
            return value
        return msgspec.msgpack.decode(self._receive(MessageKind.VALUE))

    def agree(self, what: str, value: object) -> None:
        """Make sure that all processes have the same, by its representation.

        Raises:
            JobEnded: naming the process that has another than the first.
        """
        own = hashlib.sha256(repr(value).encode()).hexdigest()
        if self.share(own) != own:
            self.failed(InvalidInput(f"{what} differs from that of process 0; start all processes with the same arguments and files"))

    def runner(self, runner: Runner) -> Runner:
        """The runner, watched: a call of it that does not end ends the job."""
        return runner if self.count == 1 else _Watched(runner, self._watch)

    # Running.

    def check(self, requests: Sequence[Request]) -> None:
        """Raise `InvalidInput` for what cannot be sent: text that is not Unicode, numbers beyond 64 bits."""
        try:
            self._encoder.encode(requests)
        except (UnicodeEncodeError, OverflowError) as error:
            raise InvalidInput(f"request {requests[0].id}: {error}") from error

    def broadcast(self, inputs: IterationInputs) -> None:
        """
        Raises:
            JobEnded: another process has ended.
        """
        self._send(MessageKind.INPUTS, self._encoder.encode(inputs))

    def scheduled(self, number: int, digest: bytes) -> None:
        self._watch.scheduled(number, digest)

    def failed(self, error: BaseException) -> NoReturn:
        """End the job because of an error here, or of what caused it elsewhere.

        Raises:
            JobEnded: always.
        """
        if not self._watch.wait_for_failure(_REASON_SECONDS):
            reason = f"{type(error).__name__}: {error}"
            self._watch.fail(f"{self.name}: {reason}" if self.leads else reason)
        raise JobEnded(self._watch.failure) from error

    def follow(self, engine: Engine) -> None:
        """Run the iterations of the first process until it closes the group.

        Raises:
            JobEnded: a process has ended, perhaps this one.
        """
        while (message := self._receive(MessageKind.INPUTS)) is not None:
            engine.replay(self._decoder.decode(message))
        self.close()

    def close(self) -> None:
        """The job is done. In the first process this lets the others end."""
        if self._closed:
            return
        self._closed = True
        for link in self._input_links if self.leads else ():
            with contextlib.suppress(OSError):  # the watchdog knows why
                link.send(MessageKind.BYE)
        self._watch.close()
        for link in self._input_links:
            link.close()

    def _send(self, kind: MessageKind, payload: bytes) -> None:
        self._check_alive()
        try:
            for link in self._input_links:
                link.send(kind, payload)
        except OSError as error:
            self.failed(error)

    def _receive(self, kind: MessageKind) -> Any:
        """The next message of the first process; None when it has closed the group."""
        self._check_alive()
        try:
            found, payload = self._input_links[0].receive()
        except (OSError, EOFError) as error:
            self.failed(error)
        if found is MessageKind.BYE:
            return None
        if found is not kind:
            self.failed(RuntimeError(f"process 0 sent {found.name}, {kind.name} was expected: the two run different programs"))
        return payload

    def _check_alive(self) -> None:
        if self._watch.failure is not None:
            raise JobEnded(self._watch.failure)

    def _wake(self) -> None:
        for link in self._input_links:
            link.shut()


class _Watched:
    """A runner whose calls the watchdog sees."""

    def __init__(self, runner: Runner, watch: Watch) -> None:
        self._runner = runner
        self._watch = watch

    @property
    def limits(self) -> RunnerLimits:
        return self._runner.limits

    def submit(self, step: Step) -> None:
        with self._watch.call():
            self._runner.submit(step)

    def collect(self) -> StepOutput:
        with self._watch.call():
            return self._runner.collect()

    def reset(self) -> None:
        self._runner.reset()
