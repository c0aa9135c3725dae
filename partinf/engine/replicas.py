"""The inputs of an iteration from outside the engine. Its schedule follows from these and from the sampled tokens alone.

Several processes that each have a part of the devices run one engine each. The first takes the requests and broadcasts, before each
iteration, what has happened since the last one; all of them then make the same schedule. A request is sent once, when it arrives, and an
iteration in which nothing happens costs a few bytes, however many requests are in flight.

Copies of pages are not broadcast: every process makes its own in the order of the steps, and a step that reads pages comes after the one
that wrote them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

from partinf.engine.request import FinishReason, Request
from partinf.engine.step import Step, StepOutput
from partinf.foundation.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class IterationInputs:
    """The inputs of one iteration.

    Attributes:
        number: of the iteration, from 0.
        now: time on the first process's clock, in seconds.
        wait: whether it waits for the oldest step when there is nothing to schedule.
        seconds: time that each step took which was committed since the last iteration, in order.
        arrivals: requests, in order.
        ends: samples in flight that end now, by `Request.number`, with the reason; in order.
        masks: the tokens that may come next in samples that are held to grammars, by number, where that is new.
    """

    number: int
    now: float
    wait: bool = True
    seconds: tuple[float, ...] = ()
    arrivals: tuple[Request, ...] = ()
    ends: tuple[tuple[int, FinishReason], ...] = ()
    masks: tuple[tuple[int, bytes], ...] = ()


class Replicas(Protocol):
    """The processes that run one engine together, as the engine of one of them sees them."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that takes requests and leads the others."""
        ...

    def check(self, requests: Sequence[Request]) -> None:
        """Raise `InvalidInput` for requests that cannot be sent."""
        ...

    def broadcast(self, inputs: IterationInputs) -> None:
        """Send inputs to the other processes; only the leader does."""
        ...

    def scheduled(self, number: int, digest: bytes) -> None:
        """An iteration has been scheduled; equal digests mean equal schedules up to here."""
        ...

    def failed(self, error: BaseException) -> None:
        """The engine of this process cannot go on, and so no process can. May raise what ended the others."""
        ...


class PendingInputs:
    """Collects the inputs of the next iteration, for this engine and for its replicas in other processes."""

    def __init__(self, replicas: Replicas | None) -> None:
        self._replicas = replicas
        self._arrivals: list[Request] = []
        self._ends: list[tuple[int, FinishReason]] = []
        self._masks: list[tuple[int, bytes]] = []
        self._errors: dict[int, BaseException] = {}  # of samples that end as FAILED; they stay here
        self._digest = ScheduleDigest()
        self._number = 0

    @property
    def alone(self) -> bool:
        """Whether there are no other processes."""
        return self._replicas is None

    def check(self, requests: Sequence[Request]) -> None:
        """Raise `InvalidInput` for requests that cannot be sent, and in a process that does not lead."""
        if self._replicas is None:
            return
        if not self._replicas.leads:
            raise InvalidInput("this process follows another one, which takes the requests")
        self._replicas.check([_without_grammar(request) for request in requests])

    def arrive(self, requests: Sequence[Request]) -> None:
        """These requests have arrived here. The other processes get their masks and need no grammars."""
        if self._replicas is not None:
            self._arrivals += map(_without_grammar, requests)

    def restrict(self, masks: Iterable[tuple[int, bytes]]) -> None:
        """These samples, by number, may go on with the tokens of these masks, from the next iteration on."""
        self._masks += masks

    def end(self, number: int, reason: FinishReason, error: BaseException | None) -> None:
        """A sample is to end in the next iteration."""
        self._ends.append((number, reason))
        if error is not None:
            self._errors[number] = error

    def take(self, now: float, wait: bool, seconds: Iterable[float]) -> IterationInputs:
        """The inputs of the next iteration, after sending them to the other processes."""
        inputs = IterationInputs(self._number, now, wait, tuple(seconds), tuple(self._arrivals), tuple(self._ends), tuple(self._masks))
        self._number += 1
        self._arrivals.clear()
        self._ends.clear()
        self._masks.clear()
        if self._replicas is not None:
            self._replicas.broadcast(inputs)
        return inputs

    def error(self, number: int) -> BaseException | None:
        """Why a sample ends, if this process knows it; forgotten then."""
        return self._errors.pop(number, None)

    def scheduled(self, number: int, step: Step) -> None:
        """The iteration of these inputs has been scheduled."""
        if self._replicas is not None:
            self._replicas.scheduled(number, self._digest.add_step(step))

    def committed(self, output: StepOutput) -> None:
        """A step's tokens are known."""
        if self._replicas is not None:
            self._digest.add_output(output)

    def failed(self, error: BaseException) -> None:
        """The engine of this process cannot go on."""
        if self._replicas is not None:
            self._replicas.failed(error)


def _without_grammar(request: Request) -> Request:
    """A request as it is sent: without its grammar, which only this process needs."""
    return request if request.params.constraint is None else replace(request, params=replace(request.params, constraint=None))


class ScheduleDigest:
    """A digest of all schedules and sampled tokens so far.

    Of a sequence's pages the last stands for all: the others were last ones before, or are covered by a copy.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def add_step(self, step: Step) -> bytes:
        """The digest with another step."""
        self._hash.update(array("q", _numbers(step)).tobytes())
        for row in step.rows:
            if row.mask is not None:
                self._hash.update(row.mask)
        return self._hash.digest()

    def add_output(self, output: StepOutput) -> None:
        tokens = (-1 if sampled is None else sampled.token for sampled in chain(output.decode, output.prefill))
        self._hash.update(array("q", tokens).tobytes())


def _numbers(step: Step) -> Iterator[int]:
    yield from (len(step.decode), len(step.prefill), step.idle_rows, step.idle_tokens)
    for row in step.decode:
        yield from (row.slot, -1 if row.token is None else row.token, row.position, *(table.ids[-1] for table in row.tables))
    for chunk in step.prefill:
        yield from (chunk.slot, chunk.start, len(chunk.tokens), chunk.last, chunk.prefill_shard)
        yield from chain.from_iterable(table.ids for table in chunk.tables)
    for copy in chain(step.swap_out, step.swap_in):
        yield from (*copy.pages, *copy.host_pages)
