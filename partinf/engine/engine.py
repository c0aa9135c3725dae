"""The engine: requests in, tokens out. It owns the requests in flight; who executes a step it does not know.

A request travels add_request → scheduler → runner → sampled token → text → callback. Every iteration is one call of `step`.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from partinf.engine.admission import Prompt
from partinf.engine.batch import Batch, Policy
from partinf.engine.detokenize import Tokenizer
from partinf.engine.facts import Facts, Replicas, ScheduleDigest, Untold
from partinf.engine.intake import Intake, WaitingBound
from partinf.engine.live import Live
from partinf.engine.live import OnToken as OnToken
from partinf.engine.metrics import Load, Metrics
from partinf.engine.policies.fcfs import FirstComeFirstServed
from partinf.engine.request import FinishReason, Request, RequestOutput, SamplingParams, Sequence, Status, TokenEvent
from partinf.engine.runner import Runner, RunnerLimits
from partinf.engine.scheduler import Scheduler
from partinf.engine.step import SampledToken, StepOutput
from partinf.engine.streams import Driver, RequestStream
from partinf.errors import InvalidInput, raise_offences

OnStep = Callable[[Batch, StepOutput, float, float], None]


class Engine:
    """Serves many requests at once, by iteration-level batching.

    All methods may be called from any thread; iterations take turns. A request that is refused, fails or is cancelled leaves the others
    as they are. An exception from the runner ends every request in flight as FAILED and is raised by whoever ran the iteration.

    Attributes:
        metrics: counters since the start or the last `metrics.clear()`. tokenizer: as given.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        tokenizer: Tokenizer | None = None,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.perf_counter,
        seed: int = 0,
        lag: int = 0,
        prefix_caching: bool = False,
        max_waiting: int | None = None,
        max_waiting_tokens: int | None = None,
        on_step: OnStep | None = None,
        check_invariants: bool = False,
        replicas: Replicas | None = None,
    ) -> None:
        """
        Args:
            tokenizer: turns text into tokens and back; without one, prompts are token ids and texts are empty.
            policy: who runs in an iteration; `FirstComeFirstServed` unless given.
            clock: seconds; only differences count. A virtual clock makes a simulation.
            seed: what requests without a seed of their own derive theirs from.
            lag: steps that are submitted before the oldest is collected, beyond those that fill the runner's pipeline stages; 0 waits for
                each that comes out. With more, the runner must feed its own tokens.
            prefix_caching: share pages of equal prompt beginnings, where the runner can go on after them.
            max_waiting, max_waiting_tokens: bounds on the requests that wait for their first iteration, and on the tokens of their prompts;
                beyond them `add_request` and `stream` raise `Overloaded`. A request that finds nobody waiting is always taken, and so are
                those of `generate`, whose caller waits for them.
            on_step: called at every commit with batch, output, and the times when it was scheduled and committed.
            check_invariants: check after every iteration that no page and no slot is lost or held twice.
            replicas: the processes that run this engine together (`partinf.hosts`); each makes it with the same arguments. Cancels wait for
                the next iteration then, and an exception from the runner ends them all.
        """
        self.metrics = Metrics(runner.limits.num_slots)
        self.tokenizer = tokenizer
        self._runner = runner
        self._clock = clock
        self._lag = runner.limits.num_stages - 1 + lag
        self._on_step = on_step
        self._check_invariants = check_invariants
        self._intake = Intake(runner.limits, tokenizer, seed, clock)
        self._bound = WaitingBound(max_waiting, max_waiting_tokens)
        self._scheduler = Scheduler(runner.limits, policy or FirstComeFirstServed(), self.metrics, prefix_caching)
        self._returns_whole_batches = bool(getattr(self._scheduler.policy, "returns_whole_batches", False))
        self._live: dict[int, Live] = {}  # samples in flight, by number
        self._requests: dict[str, list[Live]] = {}  # those of a request, while any of them is in flight
        self._deadlines: list[tuple[float, int]] = []  # a heap, with the number of a sample
        self._in_flight: deque[tuple[Batch, float]] = deque()  # with the time when it was scheduled
        self._held: list[Live] = []  # have all their tokens and wait for the rest of their batch
        self._committed = 0.0  # time of the last commit
        self._uncharged: list[tuple[Batch, float]] = []  # committed, and the seconds not counted yet as attained by its sequences
        self._replicas = replicas
        self._untold = Untold()
        self._digest = ScheduleDigest()
        self._num_iterations = 0
        self._events: deque[tuple[Live, TokenEvent]] = deque()  # not delivered yet
        self._ended: list[Sequence] = []  # not returned by `step` yet
        self._turn = threading.RLock()  # held for an iteration
        self._lock = threading.RLock()  # held to change the state, never while the runner or a callback runs
        self._driver = Driver(self._iterate, self._pending)

    @property
    def limits(self) -> RunnerLimits:
        return self._runner.limits

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to return."""
        return self._pending() or bool(self._ended)

    @property
    def load(self) -> Load:
        """What is in the engine at the moment."""
        with self._lock:
            scheduler, limits = self._scheduler, self._runner.limits
            used = 1 - scheduler.pool.num_free_pages / (limits.num_shards * limits.pages_per_shard)
            return Load(len(scheduler.running), len(scheduler.waiting) + len(scheduler.swapped), used)

    @property
    def num_in_flight(self) -> int:
        """Steps that are submitted and not committed."""
        return len(self._in_flight)

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        on_token: OnToken | None = None,
        arrival: float | None = None,
    ) -> str:
        """Queue a request and return its id; `step` returns its output once it has ended: one for each of its n samples.

        Args:
            prompt: text, or token ids.
            request_id: must not be in flight; made up if not given.
            on_token: called for every event of this request during `step`. If it raises, its request ends as FAILED, no other.
            arrival: when it arrived, on the engine's clock, if that was before now.

        Raises:
            InvalidInput: everything that is wrong with the request; nothing has been queued then.
            Overloaded: too much is waiting; nothing has been queued.
        """
        request = self._intake.request(prompt, params, request_id, self._requests, arrival)
        self._enqueue([request], on_token, bounded=True, reported=True)
        return request.id

    def step(self, *, wait: bool = True) -> list[RequestOutput]:
        """Run one iteration, if there is work; returns what was added by `add_request` and ended since the last call.

        Args:
            wait: wait for the oldest step when there is nothing to schedule; otherwise only when enough are in flight.
        """
        self._iterate(wait)
        with self._lock:
            ended, self._ended = self._ended, []
        return [sequence.output() for sequence in ended]

    def generate(
        self,
        prompts: SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, in their order, batched with whatever else is in flight. One `params` for all, or one each; with n > 1 the
        samples of a prompt follow each other.

        Raises:
            InvalidInput: everything that is wrong with any of the requests; none has been queued then.
        """
        requests = self._intake.requests(prompts, params, self._requests)
        sequences = self._enqueue(requests, on_token, bounded=False, reported=False)
        try:
            while any(sequence.status is not Status.FINISHED for sequence in sequences):
                self._iterate()
        finally:
            for sequence in sequences:
                if sequence.status is not Status.FINISHED:
                    self.cancel(sequence.request.id)
        return [sequence.output() for sequence in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None) -> RequestStream:
        """Queue a request and return its events as they come, for `for` or `async for`.

        Raises:
            InvalidInput, Overloaded: as `add_request`, at once.
        """
        request = self._intake.request(prompt, params, request_id, self._requests)
        stream = RequestStream(request.id, self._driver, self.cancel, request.params.n)
        self._enqueue([request], stream.receive, bounded=True, reported=False)
        return stream

    def cancel(self, request_id: str) -> bool:
        """End a request with all its samples now; whether it was in flight. Its pages are free at once; the next iteration reports it.
        With `replicas` it ends in the next iteration, which tells the other processes."""
        with self._lock:
            lives = self._requests.get(request_id, [])
            self._end_everywhere(lives, FinishReason.CANCELLED)
            return bool(lives)

    def replay(self, facts: Facts) -> None:
        """Run the iteration that the leading process runs with these facts."""
        with self._lock:
            for request in facts.arrivals:
                self._add(request, None, reported=False)
        self._iterate(facts=facts)

    # An iteration: schedule, run, commit.

    def _iterate(self, wait: bool = True, facts: Facts | None = None) -> None:
        with self._turn:
            if self._replicas is not None and facts is None and not self._pending():
                return  # nothing to tell
            started = self._clock()
            try:
                wait = wait if facts is None else facts.wait
                batch = self._schedule(wait, facts)
                if batch is not None:
                    self._runner.submit(batch.step)
                    self._in_flight.append((batch, started))
                if self._in_flight and ((batch is None and wait) or len(self._in_flight) > self._lag):
                    self._commit(*self._in_flight.popleft(), self._runner.collect())
            except BaseException as error:
                self._fail_all(error)
                if self._replicas is not None:
                    self._replicas.failed(error)
                raise
            finally:
                self.metrics.busy_seconds += self._clock() - started
                self._deliver()

    def _schedule(self, wait: bool, facts: Facts | None) -> Batch | None:
        with self._lock:
            if facts is None:
                facts = self._own_facts(wait)
            self._take(facts)
            now = facts.now
            batch = self._scheduler.schedule(now)
            if batch is None and not self._in_flight and self._live:
                raise RuntimeError(f"{self._scheduler.policy} runs none of {len(self._live)} requests")
            for sequence in batch.prefill if batch is not None else ():
                if sequence.started is None:
                    sequence.started = now
                    self._bound.leave(sequence.request.id, now)
            if self._replicas is not None and batch is not None:
                self._replicas.scheduled(facts.number, self._digest.add_step(batch.step))
            return batch

    def _own_facts(self, wait: bool) -> Facts:
        """What has happened since the last iteration, told to the other processes."""
        facts = Facts(self._num_iterations, self._clock(), wait, tuple(seconds for _, seconds in self._uncharged), *self._untold.take())
        self._num_iterations += 1
        if self._replicas is not None:
            self._replicas.tell(facts)
        return facts

    def _take(self, facts: Facts) -> None:
        """Do what follows from facts, but for arrivals, which wait already."""
        for (batch, _), seconds in zip(self._uncharged, facts.seconds, strict=True):
            for sequence in (*batch.decode, *batch.prefill):
                sequence.attained += seconds
        self._uncharged.clear()
        for number, reason in facts.ends:
            live, error = self._live.get(number), self._untold.errors.pop(number, None)
            if live is not None:
                self._end(live, reason, error=error)
        self._end_late(facts.now)

    def _end_late(self, now: float) -> None:
        """End the requests whose time is over, with what they have; a complete one that waits for its batch is just returned."""
        while self._deadlines and self._deadlines[0][0] <= now:
            live = self._live.get(heapq.heappop(self._deadlines)[1])
            if live is not None:
                complete = live.sequence.finish_reason
                self._end(live, complete or FinishReason.TIMEOUT, text="" if complete else live.rest())

    def _commit(self, batch: Batch, scheduled: float, output: StepOutput) -> None:
        now = self._clock()
        seconds = output.seconds or now - max(scheduled, self._committed)
        self._committed = now
        with self._lock:
            self.metrics.record_step(batch.step, output, len(self._scheduler.waiting), seconds)
            self._uncharged.append((batch, seconds))
            if self._replicas is not None:
                self._digest.add_output(output)
            for sequence, token, new in zip(batch.decode, output.decode, batch.samples, strict=True):
                sequence.in_flight -= 1
                if new:
                    self._accept(sequence, token, now)
            for sequence, last in zip(batch.prefill, output.prefill, strict=True):
                sequence.in_flight -= 1
                if last is not None:
                    self._accept(sequence, last, now)
            for sequence, chunk, scores in zip(batch.prefill, batch.step.prefill, output.prompt_logprobs, strict=False):
                sequence.prompt_logprobs[chunk.start + 1 : chunk.start + 1 + len(scores)] = scores
            if self._held and not self._scheduler.running:
                self._return_held()
            if self._check_invariants:
                self._scheduler.check()
        if self._on_step is not None:
            self._on_step(batch, output, scheduled, now)

    def _accept(self, sequence: Sequence, sampled: SampledToken, now: float) -> None:
        """Give a sampled token to its sequence, and end that if it was the last. One that has ended meanwhile drops it."""
        if sequence.status in (Status.FINISHED, Status.HELD):
            self.metrics.dropped_tokens += 1
            return
        live = self._live[sequence.request.number]
        self.metrics.generated_tokens += 1
        sequence.tokens.append(sampled.token)
        if sequence.request.params.logprobs:
            sequence.logprobs.append(sampled.logprob)
        if sequence.request.params.top_logprobs:
            sequence.top_logprobs.append(sampled.top)
        if sequence.first_token is None:
            sequence.first_token = now
        sequence.last_token = now
        try:
            text, reason = live.read(sampled.token)
        except Exception as error:
            self._end(live, FinishReason.FAILED, error=error, token=sampled)
            return
        if reason is not None:
            self._end(live, reason, text=text, token=sampled)
        elif text or live.on_token is not None:
            self._emit(live, sampled, text)

    def _emit(
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
        if live.on_token is None:
            return
        event = TokenEvent(
            request_id=sequence.request.id,
            token=None if sampled is None else sampled.token,
            index=sequence.num_generated - (sampled is not None),
            text=text,
            logprob=None if sampled is None else sampled.logprob,
            finish_reason=reason,
            error=error,
            sample=sequence.request.sample,
            top_logprobs=sampled.top if sampled is not None and sequence.request.params.top_logprobs else None,
        )
        self._events.append((live, event))

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
        if self._returns_whole_batches and reason in (FinishReason.STOP, FinishReason.LENGTH) and sequence.status is not Status.HELD:
            self._scheduler.finish(sequence, Status.HELD)
            sequence.finish_reason = reason
            self._emit(live, token, text)
            self._held.append(live)
            return
        self._scheduler.finish(sequence)
        del self._live[sequence.request.number]
        if all(other.sequence.status is Status.FINISHED for other in self._requests[sequence.request.id]):
            del self._requests[sequence.request.id]
            self._bound.leave(sequence.request.id, None)
        sequence.finish_reason, sequence.error = reason, error
        sequence.finished = self._clock()
        self.metrics.record_finished(sequence)
        self._emit(live, token, text, reason, error)
        if live.reported:
            self._ended.append(sequence)
        if self._held and not self._scheduler.running:
            self._return_held()

    def _return_held(self) -> None:
        """The last of a batch has ended: return all of it."""
        held, self._held = self._held, []
        for live in held:
            if live.sequence.status is Status.HELD and live.sequence.finish_reason is not None:
                self._end(live, live.sequence.finish_reason)

    def _fail_all(self, error: BaseException) -> None:
        with self._lock:
            self._in_flight.clear()
            self._uncharged.clear()
            self._held.clear()
            self._scheduler.pool.forget_prefixes()
            self._end_all(list(self._live.values()), FinishReason.FAILED, error)
            if self._replicas is None:
                self._runner.reset()

    def _deliver(self) -> None:
        """Call the callbacks, outside the lock. A cancelled request hears of it here too, after all that came before."""
        while self._events:
            live, event = self._events.popleft()
            if live.on_token is None:
                continue
            try:
                live.on_token(event)
            except Exception as error:
                with self._lock:
                    self._callback_failed(live, error)

    def _callback_failed(self, live: Live, error: Exception) -> None:
        """End the request whose callback raised, all samples of it that still run."""
        live.on_token = None
        sequence = live.sequence
        if sequence.status is Status.FINISHED:
            sequence.error = sequence.error or error
        numbers = [other.request.number for other in sequence.family] or [sequence.request.number]
        lives = [self._live[number] for number in numbers if number in self._live]
        for other in lives:
            other.on_token = None
        self._end_everywhere(lives, FinishReason.FAILED, error)

    def _end_everywhere(self, lives: SequenceOf[Live], reason: FinishReason, error: BaseException | None = None) -> None:
        """End these samples now, or in the next iteration where other processes have to be told."""
        if self._replicas is None:
            self._end_all(lives, reason, error)
            return
        for live in lives:
            number = live.sequence.request.number
            self._untold.ends.append((number, reason))
            if error is not None:
                self._untold.errors[number] = error

    def _end_all(self, lives: SequenceOf[Live], reason: FinishReason, error: BaseException | None = None) -> None:
        """End those that have not ended, nor end because of each other."""
        for live in list(lives):
            if live.sequence.status is not Status.FINISHED:
                self._end(live, reason, error=error)

    def _pending(self) -> bool:
        return bool(self._live or self._in_flight or self._events)

    def _enqueue(self, requests: SequenceOf[Request], on_token: OnToken | None, *, bounded: bool, reported: bool) -> list[Sequence]:
        """Queue all of these requests, or none."""
        if self._replicas is not None and not self._replicas.leads:
            raise InvalidInput("this process follows another one, which takes the requests")
        if self._replicas is not None:
            self._replicas.check(requests)
        with self._lock:
            taken = [request.id for request in requests if request.id in self._requests]
            raise_offences(f"request {name}: this id is in flight already; choose another one" for name in taken)
            for request in requests if bounded else ():
                self._bound.check(len(request.prompt), self._clock())
            if self._replicas is not None:
                self._untold.arrivals += requests
            return [sequence for request in requests for sequence in self._add(request, on_token, reported)]

    def _add(self, request: Request, on_token: OnToken | None, reported: bool) -> list[Sequence]:
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
