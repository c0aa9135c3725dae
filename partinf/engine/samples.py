"""The samples of all requests in flight: registered, given their tokens, ended, with the events of each."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator

from partinf.engine.batch import ScheduledBatch
from partinf.engine.intake import Intake, WaitingBound
from partinf.engine.live import Live, OnToken
from partinf.engine.mask_workers import Answer, MaskWorkers
from partinf.engine.metrics import Metrics
from partinf.engine.request import FinishReason, Request, Sequence, Status, TokenEvent
from partinf.engine.scheduler import Scheduler
from partinf.engine.step import SampledToken, StepOutput
from partinf.foundation.errors import NotFinite

_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


class Samples:
    """Registers samples with the scheduler and the bound on waiting, and takes them out of both when they end.

    The engine calls it with its lock held, but for `events`. Under a policy that returns whole batches, a sample that has all its tokens is
    held until no sequence of its batch runs.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        intake: Intake,
        bound: WaitingBound,
        metrics: Metrics,
        clock: Callable[[], float],
        workers: MaskWorkers,
    ) -> None:
        self._scheduler = scheduler
        self._intake = intake
        self._bound = bound
        self._metrics = metrics
        self._clock = clock
        self._workers = workers
        self._returns_whole_batches = bool(getattr(scheduler.policy, "returns_whole_batches", False))
        self._live: dict[int, Live] = {}  # by number
        self._requests: dict[str, list[Live]] = {}  # all samples of a request, while any of them is in flight
        self._deadlines: list[tuple[float, int]] = []  # a heap, with the number of a sample
        self._held: list[Live] = []
        self._events: deque[tuple[Live, TokenEvent]] = deque()  # not delivered yet
        self._ended: list[Sequence] = []  # not returned yet
        # Tokens of the batch that is committed, by when their samples had the last one: mostly one entry.
        self._before: defaultdict[float | None, int] = defaultdict(int)

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Live]:
        return iter(self._live.values())

    @property
    def names(self) -> Collection[str]:
        """Ids of the requests in flight."""
        return self._requests.keys()

    @property
    def any_events(self) -> bool:
        return bool(self._events)

    @property
    def any_ended(self) -> bool:
        return bool(self._ended)

    def get(self, number: int) -> Live | None:
        """A sample in flight, by `Request.number`."""
        return self._live.get(number)

    def of_request(self, request_id: str) -> list[Live]:
        """All samples of a request, those that have ended included, while any of them is in flight; else none."""
        return self._requests.get(request_id, [])

    def add(self, request: Request, on_token: OnToken | None, reported: bool) -> list[Sequence]:
        """Register the samples of a request. What is `reported` comes out of `take_ended`."""
        lives = self._intake.samples(request, on_token, reported)
        self._requests[request.id] = lives
        self._bound.enter(request.id, len(request.prompt))
        for live in lives:
            number = live.sequence.request.number
            self._live[number] = live
            self._scheduler.add(live.sequence)
            if request.params.timeout is not None:
                heapq.heappush(self._deadlines, (request.arrival + request.params.timeout, number))
        return [live.sequence for live in lives]

    def start(self, sequences: Iterable[Sequence], now: float) -> None:
        """These run in the iteration that was scheduled now; those that never did so before wait no longer."""
        for sequence in sequences:
            if sequence.started is None:
                sequence.started = now
                self._bound.leave(sequence.request.id, now)

    def commit(self, batch: ScheduledBatch, output: StepOutput, now: float) -> None:
        """Give a batch its output."""
        self._take_scores(batch, output)
        self._before.clear()
        for sequence, token, new in zip(batch.decode, output.decode, batch.samples, strict=True):
            sequence.in_flight -= 1
            if new:
                self._accept(sequence, token, now)
        for sequence, last in zip(batch.prefill, output.prefill, strict=True):
            sequence.in_flight -= 1
            if last is not None:
                self._accept(sequence, last, now)
        self._metrics.record_gaps(now, self._before)
        self._return_held()

    def _take_scores(self, batch: ScheduledBatch, output: StepOutput) -> None:
        """Log-probabilities of prompts, before a token ends their request."""
        for sequence, chunk, scores in zip(batch.prefill, batch.step.prefill, output.prompt_scores, strict=False):
            known = next((place for place, score in enumerate(scores) if not math.isfinite(score.logprob)), len(scores))
            sequence.prompt_scores[chunk.start + 1 : chunk.start + 1 + known] = scores[:known]
            if known < len(scores) and sequence.request.number in self._live:
                self._fail(self._live[sequence.request.number], NotFinite(chunk.start + 1 + known))

    def end(self, lives: Iterable[Live], reason: FinishReason, error: BaseException | None = None) -> None:
        """End those that have not ended, nor end because of each other."""
        for live in list(lives):
            if live.sequence.status is not Status.FINISHED:
                self._end(live, reason, error=error)
        self._return_held()

    def end_late(self, now: float) -> None:
        """End the samples whose time is over, with what they have; a complete one that is held is just returned."""
        while self._deadlines and self._deadlines[0][0] <= now:
            live = self._live.get(heapq.heappop(self._deadlines)[1])
            if live is not None:
                complete = live.sequence.finish_reason
                self._end(live, complete or FinishReason.TIMEOUT, text="" if complete else live.rest())

    def end_all(self, error: BaseException) -> None:
        """End every sample as FAILED, including those that are held."""
        self._held.clear()
        self.end(self, FinishReason.FAILED, error)

    def silence(self, live: Live, error: Exception) -> list[Live]:
        """Tell the request of this sample nothing more, since its callback raised; returns its samples that are still in flight."""
        live.on_token = None
        sequence = live.sequence
        if sequence.status is Status.FINISHED:
            sequence.error = sequence.error or error
        numbers = [other.request.number for other in sequence.family] or [sequence.request.number]
        lives = [self._live[number] for number in numbers if number in self._live]
        for other in lives:
            other.on_token = None
        return lives

    def events(self) -> Iterator[tuple[OnToken, TokenEvent, Live]]:
        """Callbacks that are due, in order; each is gone once it was given out. Needs no lock."""
        while self._events:
            live, event = self._events.popleft()
            if live.on_token is not None:
                yield live.on_token, event, live

    def take_ended(self) -> list[Sequence]:
        """Those that were to be reported and have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    @property
    def any_unmasked(self) -> bool:
        """Whether any sample waits for its mask."""
        return any(live.sequence.unmasked for live in self)

    def read_masks(self, answers: Iterable[Answer]) -> tuple[list[tuple[int, bytes]], list[tuple[Live, FinishReason, Exception | None]]]:
        """Of what the workers have found out: masks, by `Request.number`, and samples that end, complete or not."""
        masks, over = list[tuple[int, bytes]](), list[tuple[Live, FinishReason, Exception | None]]()
        for number, mask, error in answers:
            live = self._live.get(number)
            if live is None:  # it has ended meanwhile
                self._workers.end(number)
                continue
            if mask is not None:
                masks.append((number, mask))
            elif error is None:
                over.append((live, FinishReason.STOP, None))
                if rest := live.rest():
                    self._tell(live, None, rest)
            else:
                over.append((live, FinishReason.FAILED, error))
        return masks, over

    def restrict(self, number: int, mask: bytes) -> None:
        """A sample may go on with the tokens of a mask."""
        live = self._live.get(number)
        if live is not None:
            live.sequence.mask, live.sequence.unmasked = mask, False
            live.sequence.in_flight -= 1

    def _accept(self, sequence: Sequence, sampled: SampledToken, now: float) -> None:
        """Give a sampled token to its sequence, and end that if it was the last. One that has ended meanwhile drops it."""
        if sequence.status in (Status.FINISHED, Status.HELD):
            self._metrics.dropped_tokens += 1
            return
        live = self._live[sequence.request.number]
        if sampled.token < 0:
            self._fail(live, NotFinite(len(sequence.tokens)))
            return
        self._metrics.generated_tokens += 1
        self._before[sequence.last_token] += 1
        sequence.append(sampled, now)
        try:
            text, reason = live.read(sampled.token)
        except Exception as error:
            self._end(live, FinishReason.FAILED, error=error, token=sampled)
            return
        if reason is not None:
            self._end(live, reason, text=text, token=sampled)
            return
        if sequence.mask is not None:
            sequence.unmasked = True
            sequence.in_flight += 1  # what may follow is as little known as a token that is being computed
            if live.constraint is not None:
                self._workers.ask(sequence.request.number, live.constraint, sampled.token)
        if text or live.on_token is not None:
            self._tell(live, sampled, text)

    def _fail(self, live: Live, error: NotFinite) -> None:
        """End a sample whose keys and values may not be finite; no later request may reuse them."""
        self._end(live, FinishReason.FAILED, error=error)
        self._scheduler.pool.forget(live.sequence)

    def _end(
        self,
        live: Live,
        reason: FinishReason,
        *,
        text: str = "",
        token: SampledToken | None = None,
        error: BaseException | None = None,
    ) -> None:
        sequence = live.sequence
        if self._returns_whole_batches and reason in _COMPLETE and sequence.status is not Status.HELD:
            self._scheduler.finish(sequence, Status.HELD)
            sequence.finish_reason = reason
            if token is not None or text:
                self._tell(live, token, text)
            self._held.append(live)
            return
        self._scheduler.finish(sequence)
        if sequence.mask is not None:
            self._workers.end(sequence.request.number)
        del self._live[sequence.request.number]
        if all(other.sequence.status is Status.FINISHED for other in self._requests[sequence.request.id]):
            del self._requests[sequence.request.id]
            self._bound.leave(sequence.request.id, None)
        sequence.finish_reason, sequence.error = reason, error
        sequence.finished = self._clock()
        self._metrics.record_finished(sequence)
        self._tell(live, token, text, reason, error)
        if live.reported:
            self._ended.append(sequence)
        self._return_held()

    def _return_held(self) -> None:
        """When the last of a batch has ended, return all of it."""
        if not self._held or self._scheduler.running:
            return
        held, self._held = self._held, []
        for live in held:
            if live.sequence.status is Status.HELD and live.sequence.finish_reason is not None:
                self._end(live, live.sequence.finish_reason)

    def _tell(
        self,
        live: Live,
        sampled: SampledToken | None,
        text: str,
        reason: FinishReason | None = None,
        error: BaseException | None = None,
    ) -> None:
        sequence = live.sequence
        if text:
            sequence.pieces.append(text)
        if live.on_token is not None:
            self._events.append((live, sequence.event(sampled, text, reason, error)))
