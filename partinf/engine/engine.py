"""The engine: requests in, tokens out. It owns the requests in flight; who executes a step it does not know.

A request travels add_request → scheduler → runner → sampled token → text → callback. Every iteration is one call of `step`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from partinf.engine.admission import Prompt, RequestCheck
from partinf.engine.batch import Batch, Policy
from partinf.engine.detokenize import TextReader, Tokenizer
from partinf.engine.live import Live
from partinf.engine.live import OnToken as OnToken
from partinf.engine.metrics import Metrics
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
        metrics: counters since the start or the last `metrics.clear()`.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        tokenizer: Tokenizer | None = None,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.perf_counter,
        seed: int = 0,
        lag: int | None = None,
        prefix_caching: bool = False,
        on_step: OnStep | None = None,
        check_invariants: bool = False,
    ) -> None:
        """
        Args:
            tokenizer: turns text into tokens and back; without one, prompts are token ids and texts are empty.
            policy: who runs in an iteration; `FirstComeFirstServed` unless given.
            clock: seconds; only differences count. A virtual clock makes a simulation.
            seed: what requests without a seed of their own derive theirs from.
            lag: steps that are submitted before the oldest is collected; 0 waits for each. The runner must then feed its own tokens. Unless
                given, it fills the runner's pipeline stages.
            prefix_caching: share pages of equal prompt beginnings, where the runner can go on after them.
            on_step: called at every commit with batch, output, and the times when it was scheduled and committed.
            check_invariants: check after every iteration that no page and no slot is lost or held twice.
        """
        self.metrics = Metrics(runner.limits.num_slots)
        self._runner = runner
        self._tokenizer = tokenizer
        self._clock = clock
        self._lag = runner.limits.num_stages - 1 if lag is None else lag
        self._on_step = on_step
        self._check_invariants = check_invariants
        self._check_request = RequestCheck(runner.limits, tokenizer, seed)
        self._scheduler = Scheduler(runner.limits, policy or FirstComeFirstServed(), self.metrics, prefix_caching)
        self._returns_whole_batches = bool(getattr(self._scheduler.policy, "returns_whole_batches", False))
        self._numbers = itertools.count()
        self._live: dict[str, Live] = {}
        self._in_flight: deque[tuple[Batch, float]] = deque()  # with the time when it was scheduled
        self._held: list[Live] = []  # have all their tokens and wait for the rest of their batch
        self._committed = 0.0  # time of the last commit
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
        """Queue a request and return its id; `step` returns its output once it has ended.

        Args:
            prompt: text, or token ids.
            request_id: must not be in flight; made up if not given.
            on_token: called for every event of this request during `step`. If it raises, its request ends as FAILED, no other.
            arrival: when it arrived, on the engine's clock, if that was before now.

        Raises:
            InvalidInput: everything that is wrong with the request; nothing has been queued then.
        """
        return self._enqueue(self._request(prompt, params, request_id, arrival), on_token, reported=True).request.id

    def step(self, *, wait: bool = True) -> list[RequestOutput]:
        """Run one iteration, if there is work; returns the requests added by `add_request` that ended since the last call.

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
        """Answer all prompts, in their order, batched with whatever else is in flight. One `params` for all, or one each.

        Raises:
            InvalidInput: everything that is wrong with any of the requests; none has been queued then.
        """
        requests = self._requests(prompts, params)
        sequences: list[Sequence] = []
        try:
            for request in requests:
                sequences.append(self._enqueue(request, on_token, reported=False))
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
            InvalidInput: as `add_request`, at once.
        """
        request = self._request(prompt, params, request_id)
        stream = RequestStream(request.id, self._driver, self.cancel)
        self._enqueue(request, stream.receive, reported=False)
        return stream

    def cancel(self, request_id: str) -> bool:
        """End a request now; whether it was in flight. Its pages are free at once; it is reported by the next iteration."""
        with self._lock:
            live = self._live.get(request_id)
            if live is not None:
                self._end(live, FinishReason.CANCELLED)
            return live is not None

    # An iteration: schedule, run, commit.

    def _iterate(self, wait: bool = True) -> None:
        with self._turn:
            started = self._clock()
            try:
                batch = self._schedule()
                if batch is not None:
                    self._runner.submit(batch.step)
                    self._in_flight.append((batch, started))
                if self._in_flight and ((batch is None and wait) or len(self._in_flight) > self._lag):
                    self._commit(*self._in_flight.popleft(), self._runner.collect())
            except BaseException as error:
                self._fail_all(error)
                raise
            finally:
                self.metrics.busy_seconds += self._clock() - started
                self._deliver()

    def _schedule(self) -> Batch | None:
        with self._lock:
            now = self._clock()
            batch = self._scheduler.schedule(now)
            if batch is None and not self._in_flight and self._live:
                raise RuntimeError(f"{self._scheduler.policy} runs none of {len(self._live)} requests")
            for sequence in batch.prefill if batch is not None else ():
                if sequence.started is None:
                    sequence.started = now
            return batch

    def _commit(self, batch: Batch, scheduled: float, output: StepOutput) -> None:
        now = self._clock()
        seconds = output.seconds or now - max(scheduled, self._committed)
        self._committed = now
        with self._lock:
            self.metrics.record_step(batch.step, output, len(self._scheduler.waiting), seconds)
            for sequence, token, new in zip(batch.decode, output.decode, batch.samples, strict=True):
                sequence.in_flight -= 1
                sequence.attained += seconds
                if new:
                    self._accept(sequence, token, now)
            for sequence, last in zip(batch.prefill, output.prefill, strict=True):
                sequence.in_flight -= 1
                sequence.attained += seconds
                if last is not None:
                    self._accept(sequence, last, now)
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
        live = self._live[sequence.request.id]
        self.metrics.generated_tokens += 1
        sequence.tokens.append(sampled.token)
        if sequence.request.params.logprobs:
            sequence.logprobs.append(sampled.logprob)
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
        del self._live[sequence.request.id]
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
            self._held.clear()
            self._scheduler.pool.forget_prefixes()
            for live in list(self._live.values()):
                self._end(live, FinishReason.FAILED, error=error)
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
                    live.on_token = None
                    if live.sequence.status is Status.FINISHED:
                        live.sequence.error = live.sequence.error or error
                    else:
                        self._end(live, FinishReason.FAILED, error=error)

    def _pending(self) -> bool:
        return bool(self._live or self._in_flight or self._events)

    # A request on its way in.

    def _request(self, prompt: Prompt, params: SamplingParams | None, request_id: str | None, arrival: float | None = None) -> Request:
        number = next(self._numbers)
        while request_id is None and f"request-{number}" in self._live:
            number = next(self._numbers)
        name = f"request-{number}" if request_id is None else request_id
        when = self._clock() if arrival is None else arrival
        return self._check_request(prompt, SamplingParams() if params is None else params, name, number, when)

    def _requests(self, prompts: SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None) -> list[Request]:
        if isinstance(prompts, str):
            raise InvalidInput("prompts is one text; give a list of prompts")
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InvalidInput(f"{len(each)} params for {len(prompts)} prompts; give one for all, or one each")
        requests, offences = [], list[str]()
        for prompt, one in zip(prompts, each, strict=True):
            try:
                requests.append(self._request(prompt, one, None))
            except InvalidInput as error:
                offences += error.offences
        raise_offences(offences)
        return requests

    def _enqueue(self, request: Request, on_token: OnToken | None, *, reported: bool) -> Sequence:
        ends = set(request.params.stop_token_ids)
        reader = None
        if self._tokenizer is not None:
            ends |= set() if request.params.ignore_eos else set(self._tokenizer.eos_ids)
            reader = TextReader(self._tokenizer.stream(continuation=True), request.params.stop)
        full_len = len(request.prompt) + request.max_tokens
        live = Live(Sequence(request), reader, frozenset(ends), full_len, on_token, reported)
        with self._lock:
            if request.id in self._live:
                raise InvalidInput(f"request {request.id}: this id is in flight already; choose another one")
            self._live[request.id] = live
            self._scheduler.add(live.sequence)
        return live.sequence
