"""What the engine did, counted: iterations, tokens, padding, and the times of the requests that ended."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from partinf.engine.request import FinishReason, RequestTimes, Sequence
from partinf.engine.step import Step, StepOutput

# Upper bounds in seconds of the histogram of times between the tokens of a sample.
GAP_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4),
    *(0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REMEMBERED = 100_000  # requests whose times are stored; older ones stay in the counters alone


@dataclass(frozen=True)
class Distribution:
    """Mean and percentiles (nearest rank) of some values; all NaN when there are none."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution:
        """Of those values that are not None."""
        known = sorted(value for value in values if value is not None)
        if not known:
            return cls(0, math.nan, math.nan, math.nan, math.nan)
        ranks = [known[max(0, math.ceil(share * len(known)) - 1)] for share in (0.5, 0.95, 0.99)]
        return cls(len(known), sum(known) / len(known), *ranks)


@dataclass(frozen=True)
class Summary:
    """Counters since the last clear. Times in seconds on the engine's clock.

    Attributes:
        finished: requests that ended, by reason; a request of n samples counts n times, here and among the times.
        iterations: steps run. prefill_tokens, decode_tokens: tokens that went through the model, without padding.
        padding_tokens: padding that went through the model with them, where the runner reports it.
        generated_tokens: tokens that reached a request. dropped_tokens: sampled for a request that had already ended.
        mean_batch_size: sequences per iteration. occupancy: the same as a share of the slots.
        preemptions: times that a request lost its pages and began again; recomputed_tokens: what was computed for nothing by then.
        cached_tokens: prompt tokens found in the prefix cache. swap_outs, swapped_out_pages, swapped_in_pages: to host memory and back.
        mean_queue, longest_queue: requests waiting when an iteration was committed.
        busy_seconds: time spent in iterations. tokens_per_second: generated_tokens over busy_seconds.
        ttft, time_per_token, completion_time, normalized_latency: over requests, as `RequestTimes` defines them.
    """

    finished: dict[FinishReason, int]
    iterations: int
    prefill_tokens: int
    decode_tokens: int
    padding_tokens: int
    generated_tokens: int
    dropped_tokens: int
    mean_batch_size: float
    occupancy: float
    preemptions: int
    recomputed_tokens: int
    cached_tokens: int
    swap_outs: int
    swapped_out_pages: int
    swapped_in_pages: int
    mean_queue: float
    longest_queue: int
    busy_seconds: float
    tokens_per_second: float
    ttft: Distribution
    time_per_token: Distribution
    completion_time: Distribution
    normalized_latency: Distribution

    @property
    def num_finished(self) -> int:
        return sum(self.finished.values())


@dataclass(frozen=True)
class Load:
    """What an engine holds: sequences with a slot, those without, and the share of the KV pages in use, from 0 to 1."""

    num_running: int
    num_waiting: int
    page_usage: float


class Metrics:
    """The engine's counters; `Engine.metrics` is one. The engine writes, anyone may read.

    Attributes:
        token_gaps: tokens by the time since the one before them in their sample: up to each of `GAP_BOUNDS`, and longer.
        token_gap_seconds: the sum of these times.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self.clear()

    def clear(self) -> None:
        """Start again from zero, for instance after a warm-up."""
        self.iterations = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.padding_tokens = 0
        self.generated_tokens = 0
        self.dropped_tokens = 0
        self.busy_seconds = 0.0
        self.step_seconds = 0.0
        self.preemptions = 0
        self.recomputed_tokens = 0
        self.cached_tokens = 0
        self.swap_outs = 0
        self.swapped_out_pages = 0
        self.swapped_in_pages = 0
        self.longest_queue = 0
        self.token_gaps = [0] * (len(GAP_BOUNDS) + 1)
        self.token_gap_seconds = 0.0
        self._queued = 0
        self._rows = 0
        self._finished: Counter[FinishReason] = Counter()
        self._times: deque[RequestTimes] = deque(maxlen=_REMEMBERED)

    @property
    def times(self) -> list[RequestTimes]:
        """Of the requests that ended, oldest first."""
        return list(self._times)

    def record_step(self, step: Step, output: StepOutput, queue_len: int = 0, seconds: float = 0.0) -> None:
        """A step that was committed, the requests that waited then, and how long it took."""
        self.iterations += 1
        self.step_seconds += seconds
        self._queued += queue_len
        self.longest_queue = max(self.longest_queue, queue_len)
        self.decode_tokens += len(step.decode)
        self.prefill_tokens += step.num_prefill_tokens
        self.padding_tokens += max(0, output.padded_tokens - step.num_tokens)
        self._rows += len(step.decode) + len(step.prefill)

    def record_gaps(self, now: float, before: Mapping[float | None, int]) -> None:
        """Tokens that came now, counted by when their samples had the one before; None for first ones."""
        for last, count in before.items():
            if last is not None:
                self.token_gaps[bisect_left(GAP_BOUNDS, now - last)] += count
                self.token_gap_seconds += (now - last) * count

    def record_finished(self, sequence: Sequence) -> None:
        assert sequence.finish_reason is not None
        self._finished[sequence.finish_reason] += 1
        self._times.append(sequence.times())

    def summary(self) -> Summary:
        mean_batch_size = self._rows / self.iterations if self.iterations else 0.0
        mean_queue = self._queued / self.iterations if self.iterations else 0.0
        times = list(self._times)
        return Summary(
            finished=dict(self._finished),
            iterations=self.iterations,
            prefill_tokens=self.prefill_tokens,
            decode_tokens=self.decode_tokens,
            padding_tokens=self.padding_tokens,
            generated_tokens=self.generated_tokens,
            dropped_tokens=self.dropped_tokens,
            mean_batch_size=mean_batch_size,
            occupancy=mean_batch_size / self._num_slots,
            preemptions=self.preemptions,
            recomputed_tokens=self.recomputed_tokens,
            cached_tokens=self.cached_tokens,
            swap_outs=self.swap_outs,
            swapped_out_pages=self.swapped_out_pages,
            swapped_in_pages=self.swapped_in_pages,
            mean_queue=mean_queue,
            longest_queue=self.longest_queue,
            busy_seconds=self.busy_seconds,
            tokens_per_second=self.generated_tokens / self.busy_seconds if self.busy_seconds else 0.0,
            ttft=Distribution.of(t.ttft for t in times),
            time_per_token=Distribution.of(t.time_per_token for t in times),
            completion_time=Distribution.of(t.completion_time for t in times),
            normalized_latency=Distribution.of(t.normalized_latency for t in times),
        )
