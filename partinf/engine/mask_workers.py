"""The threads that compute which tokens may come next under a grammar: the engine's own, or further ones.

A mask mostly takes some microseconds, less than it costs to hand it to a thread, and for a hostile grammar seconds, in which no other row
would get a token. So the engine's thread asks for a quick one first, and gives an answer to the threads for the rest of its life once that
is refused, or once the masks of an iteration have taken more than their share of it. Rows of such answers wait for their masks, others do
not; tokens follow from masks alone, so how long one takes changes when a row runs and never what it says. Without threads everything is
done in the engine's, which is the plain twin: schedules then depend on no clock.

A thread takes the answer first whose masks took least so far, in the mean. So hostile answers wait for those that are only slow, and not
the other way round, however many there are.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

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
class _Cost:
    """What the masks of an answer that was given away took: seconds of a thread, for so many."""

    seconds: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        return self.seconds / self.count if self.count else 0.0


@dataclass(eq=False, slots=True)
class _MaskRequest:
    """A question for a thread and, once it is there, its answer. Nobody waits for one that is `dropped`."""

    number: int
    constraint: Constraint
    token: int
    cost: _Cost
    since: float = field(default_factory=time.monotonic)
    dropped: bool = False
    answer: Answer | None = None


class MaskWorkers:
    """Computes masks on request, by number of a sample, one at a time for each. Only the engine's thread calls it, but for `end`."""

    def __init__(self, num_threads: int) -> None:
        """
        Args:
            num_threads: for what is not quick; 0 does it in the calling thread.
        """
        self._num_threads = num_threads
        # Made when they are needed first. An answer stays with one thread, which may keep what belongs to it.
        self._threads: dict[int, ThreadPoolExecutor] = {}
        self._new: list[tuple[int, Constraint, int]] = []
        self._slow: dict[int, _MaskRequest] = {}  # that the threads have, by number
        self._given_away: dict[int, _Cost] = {}  # by number
        self._changed = threading.Condition()  # held to change what the threads read
        self._queues: dict[int, list[tuple[float, int, _MaskRequest]]] = {}  # a heap for each thread
        self._order = itertools.count()

    @property
    def pending(self) -> bool:
        """Whether anything was requested that has not been given out."""
        return bool(self._new or self._slow)

    def ask(self, number: int, constraint: Constraint, token: int) -> None:
        """What may follow this token, which the sample of this number was given; `take` begins with it."""
        self._new.append((number, constraint, token))

    def take(self) -> list[Answer]:
        """What has come: first what is quick of what was requested since the last call, in this order."""
        if not self._new and not self._slow:
            return []
        taken = self._find_quick()
        if self._slow:
            now = time.monotonic()
            for one in list(self._slow.values()):
                if one.answer is not None:
                    taken.append(one.answer)
                elif now - one.since > LONGEST:
                    taken.append((one.number, None, TooSlow(f"what may follow in the answer was not known after {LONGEST:g} s")))
                else:
                    continue
                self._forget(one.number)
        return taken

    def wait(self) -> None:
        """Wait until any has come, though not for long."""
        with self._changed:
            self._changed.wait_for(lambda: any(one.answer is not None for one in list(self._slow.values())), _IDLE)

    def end(self, number: int) -> None:
        """The sample of this number has ended. Any thread may call it."""
        self._forget(number)
        self._given_away.pop(number, None)

    def forget(self) -> None:
        """No result is awaited any more."""
        self._new.clear()
        for number in list(self._slow):
            self._forget(number)

    def _forget(self, number: int) -> None:
        request = self._slow.pop(number, None)
        if request is not None:
            request.dropped = True

    def _find_quick(self) -> list[Answer]:
        """Begin with what is new, all of it in a row: the first mask after other work takes several times as long as those that follow."""
        new, self._new = self._new, []
        found = list[Answer]()
        threads = self._num_threads > 0
        started = time.thread_time() if threads else 0.0  # of a core: an answer does not go because the machine is busy
        for number, constraint, token in new:
            if number in self._given_away:
                self._hand_over(number, constraint, token)
                continue
            try:
                found.append(_result(number, constraint, token, quick=threads))
            except Costly:
                self._given_away[number] = _Cost()
                self._hand_over(number, constraint, token)
            else:
                if threads and time.thread_time() - started > SHARE:
                    self._given_away[number] = _Cost()
        return found

    def _hand_over(self, number: int, constraint: Constraint, token: int) -> None:
        request = self._slow[number] = _MaskRequest(number, constraint, token, self._given_away.get(number) or _Cost())
        place = number % self._num_threads
        if place not in self._threads:
            self._threads[place] = ThreadPoolExecutor(1, thread_name_prefix=f"partinf-masks-{place}")
        with self._changed:
            heapq.heappush(self._queues.setdefault(place, []), (request.cost.mean, next(self._order), request))
        self._threads[place].submit(self._work, place)

    def _work(self, place: int) -> None:
        """In a thread: what is first in its queue, unless nobody waits for that any more."""
        with self._changed:
            request = heapq.heappop(self._queues[place])[-1]
        if request.dropped:
            return
        started = time.monotonic()
        request.answer = _result(request.number, request.constraint, request.token)
        request.cost.seconds += time.monotonic() - started
        request.cost.count += 1
        with self._changed:
            self._changed.notify_all()


def _result(number: int, constraint: Constraint, token: int, quick: bool = False) -> Answer:
    """
    Raises:
        Costly: it is not quick to be had, but was to be.
    """
    try:
        return number, constraint.accept(token, quick), None
    except Costly:
        raise
    except Exception as error:
        return number, None, error
