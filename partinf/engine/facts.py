"""What an iteration is told from outside. The engine's schedule follows from this and from the sampled tokens, from nothing else.

Several processes that each have a part of the devices run one engine each. The first takes the requests and tells the others, before each
iteration, what has happened since the last one; all of them then make the same schedule. A request crosses over once, when it arrives, and
an iteration in which nothing happens costs a few bytes, however many requests are in flight.

Copies of pages are not told: every process makes its own in the order of the steps, and a step that reads pages comes after the one that
wrote them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

from partinf.engine.request import FinishReason, Request
from partinf.engine.step import Step, StepOutput


@dataclass(frozen=True, slots=True)
class Facts:
    """What one iteration is told.

    Attributes:
        number: of the iteration, from 0.
        now: time on the first process's clock, in seconds.
        wait: whether it waits for the oldest step when there is nothing to schedule.
        seconds: time that each step took which was committed since the last iteration, in order.
        arrivals: requests, in order.
        ends: samples in flight that end now, by `Request.number`, with the reason; in order.
    """

    number: int
    now: float
    wait: bool = True
    seconds: tuple[float, ...] = ()
    arrivals: tuple[Request, ...] = ()
    ends: tuple[tuple[int, FinishReason], ...] = ()


class Replicas(Protocol):
    """The processes that run one engine together, as the engine of one of them sees them."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that takes requests and tells the others."""
        ...

    def check(self, requests: Sequence[Request]) -> None:
        """Raise `InvalidInput` for requests that cannot be told."""
        ...

    def tell(self, facts: Facts) -> None:
        """Send facts to the others; only where this process leads."""
        ...

    def scheduled(self, number: int, digest: bytes) -> None:
        """An iteration has been scheduled; equal digests mean equal schedules up to here."""
        ...

    def failed(self, error: BaseException) -> None:
        """The engine of this process cannot go on, and so nobody can. May raise what ended the others."""
        ...


@dataclass
class Untold:
    """What has happened since the last iteration and is still to be told.

    Attributes:
        errors: of samples that end as FAILED; they stay here.
    """

    arrivals: list[Request] = field(default_factory=list)
    ends: list[tuple[int, FinishReason]] = field(default_factory=list)
    errors: dict[int, BaseException] = field(default_factory=dict)

    def take(self) -> tuple[tuple[Request, ...], tuple[tuple[int, FinishReason], ...]]:
        """Arrivals and ends, which are forgotten here."""
        taken = tuple(self.arrivals), tuple(self.ends)
        self.arrivals.clear()
        self.ends.clear()
        return taken


class ScheduleDigest:
    """A digest of all schedules and sampled tokens so far.

    Of a sequence's pages the last stands for all: the others were last ones before, or are told by a copy.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def add_step(self, step: Step) -> bytes:
        """The digest with another step."""
        self._hash.update(array("q", _numbers(step)).tobytes())
        return self._hash.digest()

    def add_output(self, output: StepOutput) -> None:
        tokens = (-1 if sampled is None else sampled.token for sampled in chain(output.decode, output.prefill))
        self._hash.update(array("q", tokens).tobytes())


def _numbers(step: Step) -> Iterator[int]:
    yield from (len(step.decode), len(step.prefill), step.idle_rows, step.idle_tokens)
    for row in step.decode:
        yield from (row.slot, -1 if row.token is None else row.token, row.position, row.pages[-1])
    for chunk in step.prefill:
        yield from (chunk.slot, chunk.start, len(chunk.tokens), chunk.last, chunk.prefill_shard, *chunk.pages)
    for copy in chain(step.swap_out, step.swap_in):
        yield from (*copy.pages, *copy.host_pages)
