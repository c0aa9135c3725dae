"""The watchdog of a job: ends every process of it soon after one has died, stalled, failed or gone its own way.

A collective waits for ever for a process that does not come, and what waits in it cannot be interrupted. So the watchdog lives in threads
and connections of its own: processes say several times per second that they live, how far their schedule is with a digest of it, and
whether they are inside the runner. The first process compares and decides; every process prints the decision, and a moment later every
process ends, whatever its main thread waits for.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from partinf.foundation.errors import raise_offences
from partinf.hosts.wire import Link, MessageKind

_BEAT = struct.Struct("!q8sQ?")
_REMEMBERED = 1 << 14  # digests that the first process keeps; a process is behind by no more iterations than may be in flight


@dataclass(frozen=True)
class Bounds:
    """How long to wait, in seconds.

    Attributes:
        silence: for a sign of life of another process.
        stall: for one call of the runner to end: longer than the longest step.
        grace: for a process to end by itself once the job has failed.
        beat: between two signs of life.
    """

    silence: float = 10.0
    stall: float = 60.0
    grace: float = 2.0
    beat: float = 0.25

    def __post_init__(self) -> None:
        raise_offences(f"{name} = {value} s; it must be above 0" for name, value in vars(self).items() if not value > 0)
        if self.silence < 4 * self.beat:
            raise_offences([f"silence = {self.silence} s; it must be at least four beats of {self.beat} s"])


@dataclass(frozen=True)
class Status:
    """How far a process is.

    Attributes:
        number, digest: of the last iteration that it scheduled, -1 before the first.
        calls: calls of the runner begun so far. waiting: inside one.
    """

    number: int = -1
    digest: bytes = bytes(8)
    calls: int = 0
    waiting: bool = False

    def packed(self) -> bytes:
        return _BEAT.pack(self.number, self.digest, self.calls, self.waiting)

    @classmethod
    def of(cls, packed: bytes) -> Status:
        return cls(*_BEAT.unpack(packed))


def end_process() -> None:
    """Without waiting for threads, collectives or jax's own farewell, all of which may wait for a process that has ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class Watch:
    """The watchdog in one process.

    Attributes:
        failure: what ended the job; None while it goes on.
    """

    def __init__(
        self,
        name: str,
        peers: Mapping[int, tuple[str, Link]],
        bounds: Bounds,
        *,
        leads: bool,
        on_failure: Callable[[], None] = lambda: None,
        end: Callable[[], None] = end_process,
    ) -> None:
        """
        Args:
            name: of this process, for people. peers: names and links by index: of all others where this one leads, else of the first alone.
            on_failure: wakes the main thread from what it waits for, if that can be woken. end: ends this process.
        """
        self.failure: str | None = None
        self._name = name
        self._peers = peers
        self._bounds = bounds
        self._leads = leads
        self._on_failure = on_failure
        self._end = end
        self._failed = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._done: set[int] = set()
        self._status = Status()
        self._digests: OrderedDict[int, bytes] = OrderedDict()
        self._seen: dict[int, tuple[Status, float]] = {}  # of the others, with the time since which it has not changed
        self._own_since = time.monotonic()

    def start(self) -> None:
        for index in self._peers:
            threading.Thread(target=self._listen, args=(index,), name=f"partinf-watch-{index}", daemon=True).start()
        if self._peers:
            threading.Thread(target=self._beat, name="partinf-watch", daemon=True).start()

    # What the process says of itself.

    def scheduled(self, number: int, digest: bytes) -> None:
        with self._lock:
            self._status = Status(number, digest, self._status.calls, self._status.waiting)
            if self._leads:
                self._digests[number] = digest
                if len(self._digests) > _REMEMBERED:
                    self._digests.popitem(last=False)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around a call of the runner, which may wait for the other processes."""
        self._moved(1, True)
        try:
            yield
        finally:
            self._moved(0, False)

    def fail(self, reason: str) -> None:
        """End the job, for this reason unless there is one already."""
        with self._lock:
            if self.failure is not None or self._closing.is_set():
                return
            self.failure = reason
        print(f"partinf: {self._name}: the job ends: {reason}", file=sys.stderr, flush=True)
        threading.Thread(target=self._end_later, name="partinf-end", daemon=True).start()
        for _, link in self._peers.values():
            with contextlib.suppress(OSError):
                link.send(MessageKind.FAIL, reason.encode())
        self._failed.set()
        self._on_failure()

    def wait_for_failure(self, seconds: float) -> bool:
        """Wait until it is known what ended the job."""
        return self._failed.wait(seconds)

    def close(self) -> None:
        """The job is done: from now on no process fails by ending. Waits a moment for the others to report the same."""
        self._closing.set()
        for _, link in self._peers.values():
            with contextlib.suppress(OSError):
                link.send(MessageKind.BYE)
        deadline = time.monotonic() + self._bounds.silence
        while len(self._done) < len(self._peers) and time.monotonic() < deadline and self.failure is None:
            time.sleep(0.01)
        for _, link in self._peers.values():
            link.close()

    # The threads.

    def _end_later(self) -> None:
        time.sleep(self._bounds.grace)
        self._end()

    def _beat(self) -> None:
        while not self._closing.wait(self._bounds.beat) and self.failure is None:
            with self._lock:
                packed = self._status.packed()
            for _, link in self._peers.values():
                with contextlib.suppress(OSError):  # the process that listens there reports what happened
                    link.send(MessageKind.BEAT, packed)
            if self._leads:
                self._look_for_stalls()

    def _listen(self, index: int) -> None:
        name, link = self._peers[index]
        link.give_up_after(self._bounds.silence)
        try:
            while True:
                kind, payload = link.receive()
                if kind is MessageKind.BYE:
                    self._done.add(index)
                    if not self._leads:
                        self._closing.set()
                    return
                if kind is MessageKind.FAIL:
                    reason = payload.decode(errors="replace")
                    self.fail(f"{name}: {reason}" if self._leads else reason)
                    return
                if self._leads:
                    self._compare(index, Status.of(payload))
        except TimeoutError:
            self.fail(f"{name} was silent for {self._bounds.silence:g} s: it was stopped, or cannot be reached")
        except (OSError, EOFError):
            self.fail(f"{name} has ended")

    def _compare(self, index: int, status: Status) -> None:
        now = time.monotonic()
        with self._lock:
            before, _ = self._seen.get(index, (None, now))
            if before is None or (before.calls, before.waiting) != (status.calls, status.waiting):
                self._seen[index] = status, now
            digest = self._digests.get(status.number)
        if digest is not None and digest != status.digest:
            where = f"its schedule differs from that of process 0 at iteration {status.number} or before"
            self.fail(f"{self._peers[index][0]} disagrees: {where}")

    def _look_for_stalls(self) -> None:
        now = time.monotonic()
        with self._lock:
            processes = {0: (self._status, self._own_since)} | self._seen
        waits = [now - since for status, since in processes.values() if status.waiting]
        if max(waits, default=0.0) <= self._bounds.stall:
            return
        fewest = min(status.calls for status, _ in processes.values())
        behind = [index for index, (status, _) in processes.items() if status.calls == fewest]
        if len(behind) == len(processes):
            self.fail(f"every process has waited for {self._bounds.stall:g} s in call {fewest} of its runner, which does not end")
            return
        names = ", ".join(self._name if index == 0 else self._peers[index][0] for index in behind)
        self.fail(f"{names} stalled: others have waited for {self._bounds.stall:g} s in call {fewest + 1} of the runner")

    def _moved(self, calls: int, waiting: bool) -> None:
        with self._lock:
            old = self._status
            self._status = Status(old.number, old.digest, old.calls + calls, waiting)
            self._own_since = time.monotonic()
