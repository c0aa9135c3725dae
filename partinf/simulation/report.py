"""The figures of a run, simulated or real: latency, throughput, goodput, counters, utilisation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from partinf.engine.metrics import Distribution, Metrics, Summary
from partinf.engine.request import RequestTimes

_COUNTERS = (
    "iterations",
    "prefill_tokens",
    "decode_tokens",
    "generated_tokens",
    "dropped_tokens",
    "preemptions",
    "recomputed_tokens",
    "swap_outs",
    "swapped_out_pages",
    "swapped_in_pages",
    "cached_tokens",
    "mean_queue",
    "longest_queue",
)


@dataclass(frozen=True)
class LatencyBounds:
    """What a request must meet to count as good: seconds to its first token, seconds per token after that; None for no bound."""

    ttft: float | None = None
    time_per_token: float | None = None

    def met(self, times: RequestTimes) -> bool:
        """Whether a request that generated something meets both; one token alone has no time per token."""
        if times.ttft is None:
            return False
        slow = self.time_per_token is not None and times.time_per_token is not None and times.time_per_token > self.time_per_token
        return not slow and (self.ttft is None or times.ttft <= self.ttft)


@dataclass(frozen=True)
class Machine:
    """What the utilisation is counted against: parameters N that a token meets, chips, and the peak of one in FLOP/s."""

    num_params: int
    num_chips: int
    peak_flops: float

    def mfu(self, num_tokens: int, seconds: float) -> float:
        """2·N·tokens over what the chips could have done in that time."""
        return 2.0 * self.num_params * num_tokens / (self.num_chips * self.peak_flops * seconds)


@dataclass(frozen=True)
class RunReport:
    """Everything that was counted. Times in seconds; what is undefined (no request, no time) is None.

    Attributes:
        summary: the engine's counters. refused: requests that it did not take. num_good: those that met the bounds.
        seconds: from the first arrival to the last answer.
    """

    summary: Summary
    refused: int
    num_good: int
    seconds: float
    bounds: LatencyBounds
    machine: Machine

    @classmethod
    def of(cls, metrics: Metrics, seconds: float, refused: int, bounds: LatencyBounds, machine: Machine) -> RunReport:
        return cls(metrics.summary(), refused, sum(bounds.met(times) for times in metrics.times), seconds, bounds, machine)

    @property
    def latencies(self) -> dict[str, Distribution]:
        """Over requests, as `RequestTimes` defines them."""
        return {name: getattr(self.summary, name) for name in ("ttft", "time_per_token", "completion_time", "normalized_latency")}

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, those found in the prefix cache included."""
        return self.summary.prefill_tokens + self.summary.cached_tokens

    @property
    def requests_per_second(self) -> float | None:
        return _ratio(self.summary.num_finished, self.seconds)

    @property
    def generated_tokens_per_second(self) -> float | None:
        return _ratio(self.summary.generated_tokens, self.seconds)

    @property
    def prompt_tokens_per_second(self) -> float | None:
        return _ratio(self.prompt_tokens, self.seconds)

    @property
    def goodput(self) -> float | None:
        """Share of the requests that met the bounds; one that was refused did not."""
        return _ratio(self.num_good, self.summary.num_finished + self.refused)

    @property
    def good_requests_per_second(self) -> float | None:
        return _ratio(self.num_good, self.seconds)

    @property
    def padding(self) -> float | None:
        """Share of padding in the tokens that went through the model."""
        padding = self.summary.padding_tokens
        return _ratio(padding, self.summary.prefill_tokens + self.summary.decode_tokens + padding)

    @property
    def cache_hits(self) -> float | None:
        """Share of the prompt tokens that were found in the prefix cache."""
        return _ratio(self.summary.cached_tokens, self.prompt_tokens)

    @property
    def busy(self) -> float | None:
        """Share of the time that was spent in iterations."""
        return _ratio(self.summary.busy_seconds, self.seconds)

    @property
    def mfu(self) -> float | None:
        useful = self.summary.prefill_tokens + self.summary.decode_tokens - self.summary.recomputed_tokens
        return self.machine.mfu(useful, self.seconds) if self.seconds > 0 else None

    @property
    def chip_ms_per_token(self) -> float | None:
        return _ratio(1e3 * self.machine.num_chips * self.seconds, self.summary.generated_tokens)

    def counters(self) -> dict[str, float]:
        """What follows from the schedule alone."""
        return {name: getattr(self.summary, name) for name in _COUNTERS}

    def as_json(self) -> dict[str, Any]:
        """As one JSON object; its keys and units are an interface that others rely on."""
        figures = {
            "requests": {"finished": self.summary.num_finished, "refused": self.refused},
            "seconds": self.seconds,
            "throughput": {
                "requests_per_second": self.requests_per_second,
                "generated_tokens_per_second": self.generated_tokens_per_second,
                "prompt_tokens_per_second": self.prompt_tokens_per_second,
            },
            "latency": {name: asdict(times) for name, times in self.latencies.items()},
            "goodput": {
                "ttft_bound": self.bounds.ttft,
                "time_per_token_bound": self.bounds.time_per_token,
                "share": self.goodput,
                "requests_per_second": self.good_requests_per_second,
            },
            "counters": self.counters(),
            "mean_batch_size": self.summary.mean_batch_size,
            "occupancy": self.summary.occupancy,
            "padding": self.padding,
            "cache_hits": self.cache_hits,
            "busy": self.busy,
            "mfu": self.mfu,
            "chip_ms_per_token": self.chip_ms_per_token,
        }
        return _without_nan(figures)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
