"""The engine: requests in, tokens out. It does not know what executes a step.

A request travels add_request → scheduler → runner → sampled token → text → callback. Every iteration is one call of `step`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager

from partinf.engine.admission import Prompt
from partinf.engine.batch import Policy, ScheduledBatch
from partinf.engine.detokenize import Tokenizer
from partinf.engine.intake import Intake, WaitingBound
from partinf.engine.live import Live
from partinf.engine.live import OnToken as OnToken
from partinf.engine.mask_workers import MaskWorkers
from partinf.engine.metrics import Load, Metrics
from partinf.engine.policies.fcfs import FirstComeFirstServed
from partinf.engine.replicas import IterationInputs, PendingInputs, Replicas
from partinf.engine.request import FinishReason, Request, RequestOutput, SamplingParams, Sequence, Status
from partinf.engine.runner import Runner, RunnerLimits
from partinf.engine.samples import Samples
from partinf.engine.scheduler import Scheduler
from partinf.engine.step import StepOutput
from partinf.engine.streams import Driver, RequestStream
from partinf.foundation.errors import raise_offences

OnStep = Callable[[ScheduledBatch, StepOutput, float, float], None]


class Engine:
    """Serves many requests at once, by iteration-level batching.

    All methods may be called from any thread; iterations take turns. A request that is refused, fails or is cancelled leaves the others
    as they are. An exception from the runner ends every request in flight as FAILED and is raised in the thread that ran the iteration.

    Attributes:
        metrics: counters since the start or the last `metrics.clear()`. tokenizer, eos_ids: as given.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        tokenizer: Tokenizer | None = None,
        eos_ids: Collection[int] = (),
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
        num_mask_threads: int = 0,
    ) -> None:
        """
        Args:
            tokenizer: turns text into tokens and back; without one, prompts are token ids and texts are empty. eos_ids: tokens that end a
                text then.
            policy: who runs in an iteration; `FirstComeFirstServed` unless given, cutting prompts where there are pipeline stages: a tick
                is as long as its longest step, so steps should be alike.
            clock: seconds; only differences count. A virtual clock makes a simulation.
            seed: what requests without a seed of their own derive theirs from.
            lag: steps that are submitted before the oldest is collected, beyond those that fill the runner's pipeline stages; 0 waits for
                each that comes out. With more, the runner must feed its own tokens.
            prefix_caching: share pages of equal prompt beginnings, where the runner can go on after them.
            max_waiting, max_waiting_tokens: bounds on the requests that wait for their first iteration, and on the tokens of their prompts;
                beyond them `add_request` and `stream` raise `Overloaded`. A request that finds the queue empty is always taken, and so are
                those of `generate`, whose caller waits for them.
            on_step: called at every commit with batch, output, and the times when it was scheduled and committed.
            check_invariants: check after every iteration that no page and no slot is lost or held twice.
            replicas: the processes that run this engine together (`partinf.hosts`); each makes it with the same arguments. Cancels wait for
                the next iteration then, and an exception from the runner ends them all.
            num_mask_threads: threads that find out what may follow in answers whose grammars are not quick to read, while others go on;
                with 0 it is done between two iterations for them too.
        """
        self.metrics = Metrics(runner.limits.num_slots)
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self._runner = runner
        self._clock = clock
        self._lag = runner.limits.num_stages - 1 + lag
        self._on_step = on_step
        self._check_invariants = check_invariants
        staged = runner.limits.num_stages > 1 and runner.limits.chunks
        policy = policy or FirstComeFirstServed(chunk_prefills=staged)
        self._scheduler = Scheduler(runner.limits, policy, self.metrics, prefix_caching)
        self._intake = Intake(runner.limits, tokenizer, seed, clock, eos_ids)
        self._bound = WaitingBound(max_waiting, max_waiting_tokens)
        self._workers = MaskWorkers(num_mask_threads)
        self._samples = Samples(self._scheduler, self._intake, self._bound, self.metrics, clock, self._workers)
        self._inputs = PendingInputs(replicas)
        self._in_flight: deque[tuple[ScheduledBatch, float]] = deque()  # with the time when it was scheduled
        self._committed = deque([0.0], maxlen=runner.limits.num_stages)  # times of the last commits, as many as there are stages
        self._uncharged: list[tuple[ScheduledBatch, float]] = []  # committed, and the seconds not counted yet as attained by its sequences
        self._turn = threading.RLock()  # held for an iteration
        self._lock = threading.RLock()  # held to change the state, never while the runner or a callback runs
        self._driver = Driver(self._iterate, self._pending)

    @property
    def limits(self) -> RunnerLimits:
        return self._runner.limits

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to return."""
        return self._pending() or self._samples.any_ended

    @property
    def load(self) -> Load:
        """What is in the engine at the moment."""
        with self._lock:
            scheduler = self._scheduler
            return Load(len(scheduler.running), len(scheduler.waiting) + len(scheduler.swapped), scheduler.pool.used)

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
        request = self._intake.request(prompt, params, request_id, self._samples.names, arrival)
        self._enqueue([request], on_token, bounded=True, reported=True)
        return request.id

    def step(self, *, wait: bool = True) -> list[RequestOutput]:
        """Run one iteration, if there is work; returns what was added by `add_request` and ended since the last call.

        Args:
            wait: wait for the oldest step when there is nothing to schedule; otherwise only when enough are in flight.
        """
        self._iterate(wait)
        with self._lock:
            return [sequence.output() for sequence in self._samples.take_ended()]

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
        requests = self._intake.requests(prompts, params, self._samples.names)
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
        request = self._intake.request(prompt, params, request_id, self._samples.names)
        stream = RequestStream(request.id, self._driver, self.cancel, request.params.n)
        self._enqueue([request], stream.receive, bounded=True, reported=False)
        return stream

    def cancel(self, request_id: str) -> bool:
        """End a request with all its samples now; whether it was in flight. Its pages are free at once; the next iteration reports it.
        With `replicas` it ends in the next iteration, which is broadcast to the other processes."""
        with self._lock:
            lives = self._samples.of_request(request_id)
            self._end(lives, FinishReason.CANCELLED)
            return bool(lives)

    def replay(self, inputs: IterationInputs) -> None:
        """Run the iteration that the leading process runs with these inputs."""
        with self._lock:
            for request in inputs.arrivals:
                self._samples.add(request, None, reported=False)
        self._iterate(inputs=inputs)

    def _iterate(self, wait: bool = True, inputs: IterationInputs | None = None) -> None:
        """One iteration: schedule, run, commit."""
        with self._iteration():
            if not self._inputs.alone and inputs is None and not self._pending():
                return  # nothing to broadcast
            started = self._clock()
            self._take_masks()
            batch, wait = self._schedule(wait, inputs)
            if batch is not None:
                self._runner.submit(batch.step)
                self._in_flight.append((batch, started))
            if self._in_flight and ((batch is None and wait) or len(self._in_flight) > self._lag):
                self._commit(*self._in_flight.popleft(), self._runner.collect())
            elif batch is None and wait and self._workers.pending:
                self._workers.wait()

    @contextmanager
    def _iteration(self) -> Iterator[None]:
        """Takes its turn, fails every request when it fails, and calls the callbacks that are due after it."""
        with self._turn:
            started = self._clock()
            try:
                yield
            except BaseException as error:
                self._fail_all(error)
                self._inputs.failed(error)
                raise
            finally:
                self.metrics.busy_seconds += self._clock() - started
                self._deliver()

    def _schedule(self, wait: bool, inputs: IterationInputs | None) -> tuple[ScheduledBatch | None, bool]:
        """The next batch, and whether the iteration waits for the oldest step if there is none."""
        with self._lock:
            inputs = inputs or self._inputs.take(self._clock(), wait, (seconds for _, seconds in self._uncharged))
            self._take(inputs)
            batch = self._scheduler.schedule(inputs.now)
            if batch is not None:
                self._samples.start(batch.prefill, inputs.now)
                self._inputs.scheduled(inputs.number, batch.step)
            elif not self._in_flight and len(self._samples) and not self._samples.any_unmasked:
                raise RuntimeError(f"{self._scheduler.policy} runs none of {len(self._samples)} requests")
            return batch, inputs.wait

    def _take(self, inputs: IterationInputs) -> None:
        """Apply inputs, except for arrivals, which are queued already."""
        for (batch, _), seconds in zip(self._uncharged, inputs.seconds, strict=True):
            for sequence in (*batch.decode, *batch.prefill):
                sequence.attained += seconds
        self._uncharged.clear()
        for number, reason in inputs.ends:
            live, error = self._samples.get(number), self._inputs.error(number)
            if live is not None:
                self._samples.end([live], reason, error)
        for number, mask in inputs.masks:
            self._samples.restrict(number, mask)
        self._samples.end_late(inputs.now)

    def _take_masks(self) -> None:
        """Let answers under grammars go on, or end, whose masks have come."""
        answers = self._workers.take()
        if not answers:
            return
        with self._lock:
            masks, over = self._samples.read_masks(answers)
            self._inputs.restrict(masks)
            for live, reason, error in over:
                self._end([live], reason, error)

    def _commit(self, batch: ScheduledBatch, scheduled: float, output: StepOutput) -> None:
        now = self._clock()
        seconds = output.seconds or now - max(scheduled, self._committed[0])
        self._committed.append(now)
        with self._lock:
            self.metrics.record_step(batch.step, output, len(self._scheduler.waiting), seconds)
            self._uncharged.append((batch, seconds))
            self._inputs.committed(output)
            self._samples.commit(batch, output, now)
            if self._check_invariants:
                self._scheduler.check()
        if self._on_step is not None:
            self._on_step(batch, output, scheduled, now)

    def _fail_all(self, error: BaseException) -> None:
        with self._lock:
            self._in_flight.clear()
            self._uncharged.clear()
            self._workers.forget()
            self._scheduler.pool.forget_prefixes()
            self._samples.end_all(error)
            if self._inputs.alone:
                self._runner.reset()

    def _deliver(self) -> None:
        """Call the callbacks, outside the lock. A cancelled request hears of it here too, after all that came before."""
        for on_token, event, live in self._samples.events():
            try:
                on_token(event)
            except Exception as error:
                with self._lock:
                    self._end(self._samples.silence(live, error), FinishReason.FAILED, error)

    def _end(self, lives: SequenceOf[Live], reason: FinishReason, error: BaseException | None = None) -> None:
        """End these samples now, or in the next iteration if there are other processes."""
        if self._inputs.alone:
            self._samples.end(lives, reason, error)
            return
        for live in lives:
            self._inputs.end(live.sequence.request.number, reason, error)

    def _pending(self) -> bool:
        return bool(len(self._samples) or self._in_flight or self._samples.any_events)

    def _enqueue(self, requests: SequenceOf[Request], on_token: OnToken | None, *, bounded: bool, reported: bool) -> list[Sequence]:
        """Queue all of these requests, or none."""
        self._inputs.check(requests)
        with self._lock:
            taken = [request.id for request in requests if request.id in self._samples.names]
            raise_offences(f"request {name}: this id is in flight already; choose another one" for name in taken)
            for request in requests if bounded else ():
                self._bound.check(len(request.prompt), self._clock())
            self._inputs.arrive(requests)
            return [sequence for request in requests for sequence in self._samples.add(request, on_token, reported)]
