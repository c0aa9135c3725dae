"""The threads that compute which tokens may come next under a grammar: the engine's own, or further ones.

A mask mostly takes some microseconds, less than it costs to hand it to a thread, and for a hostile grammar seconds, in which no other row
would get a token. So the engine's thread asks for a quick one first, and gives an answer to the threads for the rest of its life once that
is refused, or once the masks of an iteration have taken more than their share of it. Rows of such answers wait for their masks, others do
not; tokens follow from masks alone, so how long one takes changes when a row runs and never what it says. Without threads everything is
done in the engine's, which is the plain twin: schedules then depend on no clock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from weakref import WeakSet

from partinf.engine.constraint import Constraint
from partinf.foundation.errors import Costly

SHARE = 0.001  # seconds of a core for which the engine's thread finds out masks in one iteration before it gives answers away
LONGEST = 10.0  # seconds after which an answer is given up whose mask has not come
_IDLE = 0.02  # for which an iteration waits that has nothing else to do; requests that arrive meanwhile wait as long


class TooSlow(Exception):
    """What may follow in an answer was not found out in time."""


# The number of a sample with its mask, None where its answer is complete, or with what went wrong.
Answer = tuple[int, bytes | None, Exception | None]


@dataclass(eq=False, slots=True)
class _MaskRequest:
    """A question and, once `ended`, its answer."""

    number: int
    constraint: Constraint
    token: int
    since: float = field(default_factory=time.monotonic)
    ended: bool = False
    mask: bytes | None = None
    error: Exception | None = None

    def work(self, quick: bool = False) -> None:
        """
        Raises:
            Costly: it is not quick to be had, but was to be.
        """
        try:
            self.mask = self.constraint.accept(self.token, quick)
        except Costly:
            raise
        except Exception as error:
            self.error = error
        self.ended = True


class MaskWorkers:
    """Computes masks on request, by number of a sample, one at a time for each. It gives them out in the order of the requests, as far as
    they are ready. Only the engine's thread calls it."""

    def __init__(self, num_threads: int) -> None:
        """
        Args:
            num_threads: for what is not quick; 0 does it in the calling thread.
        """
        self._num_threads = num_threads
        # Made when they are needed first. An answer stays with one thread, which may keep what belongs to it.
        self._threads: dict[int, ThreadPoolExecutor] = {}
        self._changed = threading.Condition()
        self._requests: deque[_MaskRequest] = deque()
        self._given_away: WeakSet[Constraint] = WeakSet()
        self._spent = 0.0  # seconds of a core in this iteration

    @property
    def pending(self) -> bool:
        """Whether anything was requested that has not been given out."""
        return bool(self._requests)

    def ask(self, number: int, constraint: Constraint, token: int) -> None:
        """What may follow this token, which the sample of this number was given."""
        request = _MaskRequest(number, constraint, token)
        self._requests.append(request)
        if not self._num_threads:
            request.work()
        elif constraint in self._given_away or not self._work_here(request):
            place = number % self._num_threads
            if place not in self._threads:
                self._threads[place] = ThreadPoolExecutor(1, thread_name_prefix=f"partinf-masks-{place}")
            self._threads[place].submit(self._work, request)

    def _work_here(self, request: _MaskRequest) -> bool:
        """Find it out if that is quick; whether it was."""
        started = time.thread_time()  # of a core: an answer does not go because the machine is busy
        with contextlib.suppress(Costly):
            request.work(quick=True)
        self._spent += time.thread_time() - started
        if not request.ended or self._spent > SHARE:
            self._given_away.add(request.constraint)
        return request.ended

    def take(self) -> list[Answer]:
        """What has come."""
        self._spent = 0.0
        if not self._requests:
            return []
        now = time.monotonic()
        taken, left = list[Answer](), deque[_MaskRequest]()
        for one in self._requests:
            if one.ended:
                taken.append((one.number, one.mask, one.error))
            elif now - one.since > LONGEST:
                taken.append((one.number, None, TooSlow(f"what may follow in the answer was not known after {LONGEST:g} s")))
            else:
                left.append(one)
        self._requests = left
        return taken

    def wait(self) -> None:
        """Wait until any has come, though not for long."""
        with self._changed:
            self._changed.wait_for(lambda: any(one.ended for one in self._requests), _IDLE)

    def forget(self) -> None:
        """No result is awaited any more."""
        self._requests.clear()

    def _work(self, request: _MaskRequest) -> None:
        request.work()
        with self._changed:
            self._changed.notify_all()
