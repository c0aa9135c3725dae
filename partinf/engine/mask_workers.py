"""Who finds out what may follow a token under a grammar: the engine's own thread, or others beside it.

A mask mostly takes some microseconds, and for a hostile grammar a hundred milliseconds, in which no other request would get a token.
Grammars that are computed outside the interpreter's lock leave the engine to others meanwhile. Their rows wait for their masks, free rows
do not; tokens follow from masks alone, so how long one takes changes when a row runs and never what it says. Without threads everything is
done in the engine's, which is the plain twin: schedules then depend on no clock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from partinf.engine.constraint import Constraint

PATIENCE = 0.001  # seconds for which an iteration waits for masks that were asked for in the one before; most have come by then
LONGEST = 10.0  # seconds after which an answer is given up whose mask has not come
_IDLE = 0.02  # for which an iteration waits that has nothing else to do; requests that arrive meanwhile wait as long


class TooSlow(Exception):
    """What may follow in an answer was not found out in time."""


# The number of a sample with its mask, None where its answer is complete, or with what went wrong.
Answer = tuple[int, bytes | None, Exception | None]


@dataclass(eq=False, slots=True)
class _Asked:
    """A question and, once `ended`, its answer."""

    number: int
    constraint: Constraint
    token: int
    asked: float = field(default_factory=time.monotonic)
    ended: bool = False
    mask: bytes | None = None
    error: Exception | None = None

    def work(self) -> None:
        try:
            self.mask = self.constraint.accept(self.token)
        except Exception as error:
            self.error = error
        self.ended = True


class MaskWorkers:
    """Asked for masks, by number of a sample, one at a time for each; gives them out in the order in which they were asked for as far as
    they have come. Only the engine's thread calls it."""

    def __init__(self, num_threads: int) -> None:
        """
        Args:
            num_threads: 0 does it in the calling thread.
        """
        self._num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None  # made when it is needed first
        self._changed = threading.Condition()
        self._asked: deque[_Asked] = deque()

    @property
    def pending(self) -> bool:
        """Whether anything was asked for that has not been given out."""
        return bool(self._asked)

    def ask(self, number: int, constraint: Constraint, token: int) -> None:
        """What may follow this token, which the sample of this number was given."""
        asked = _Asked(number, constraint, token)
        self._asked.append(asked)
        if not self._num_threads:
            asked.work()
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="partinf-masks")
        self._pool.submit(self._work, asked)

    def take(self) -> list[Answer]:
        """What has come. Waits a little for what is new."""
        if not self._asked:
            return []
        now = time.monotonic()
        new = [one for one in self._asked if not one.ended and now - one.asked < PATIENCE]
        if new:
            with self._changed:
                self._changed.wait_for(lambda: all(one.ended for one in new), new[-1].asked + PATIENCE - now)
        taken, left = list[Answer](), deque[_Asked]()
        for one in self._asked:
            if one.ended:
                taken.append((one.number, one.mask, one.error))
            elif now - one.asked > LONGEST:
                taken.append((one.number, None, TooSlow(f"what may follow in the answer was not known after {LONGEST:g} s")))
            else:
                left.append(one)
        self._asked = left
        return taken

    def wait(self) -> None:
        """Wait until any has come, though not for long."""
        with self._changed:
            self._changed.wait_for(lambda: any(one.ended for one in self._asked), _IDLE)

    def forget(self) -> None:
        """No result is awaited any more."""
        self._asked.clear()

    def _work(self, asked: _Asked) -> None:
        asked.work()
        with self._changed:
            self._changed.notify_all()
