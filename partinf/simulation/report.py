"""The figures of a run, simulated or real, as one JSON object: latency, throughput, goodput, counters, utilisation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from partinf.engine.metrics import Distribution, Metrics
from partinf.engine.request import RequestTimes


@dataclass(frozen=True)
class Bounds:
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
    """What the utilisation is counted against: useful parameters N per token, chips, and the peak of one in FLOP/s."""

    num_params: int
    num_chips: int
    peak_flops: float

    def mfu(self, num_tokens: int, seconds: float) -> float:
        """2·N·tokens over what the chips could have done in that time."""
        return 2.0 * self.num_params * num_tokens / (self.num_chips * self.peak_flops * seconds)


def report(metrics: Metrics, seconds: float, refused: int, bounds: Bounds, machine: Machine) -> dict[str, Any]:
    """Everything that was counted. Times in seconds; what cannot be said (no request, no time) is null.

    Args:
        seconds: from the first arrival to the last answer.
    """
    summary, times = metrics.summary(), metrics.times
    useful = summary.prefill_tokens + summary.decode_tokens - summary.recomputed_tokens
    passed = summary.prefill_tokens + summary.decode_tokens + summary.padding_tokens
    good = sum(bounds.met(each) for each in times)
    prompt_tokens = summary.prefill_tokens + summary.cached_tokens
    figures = {
        "requests": {"finished": summary.num_finished, "refused": refused},
        "seconds": seconds,
        "throughput": {
            "requests_per_second": _ratio(summary.num_finished, seconds),
            "generated_tokens_per_second": _ratio(summary.generated_tokens, seconds),
            "prompt_tokens_per_second": _ratio(prompt_tokens, seconds),
        },
        "latency": {
            "ttft": asdict(summary.ttft),
            "time_per_token": asdict(summary.time_per_token),
            "completion_time": asdict(summary.completion_time),
            "normalized_latency": asdict(summary.normalized_latency),
        },
        "goodput": {
            "ttft_bound": bounds.ttft,
            "time_per_token_bound": bounds.time_per_token,
            "share": _ratio(good, summary.num_finished + refused),
            "requests_per_second": _ratio(good, seconds),
        },
        "counters": {
            name: getattr(summary, name)
            for name in (
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
        },
        "mean_batch_size": summary.mean_batch_size,
        "occupancy": summary.occupancy,
        "padding": _ratio(summary.padding_tokens, passed),
        "cache_hits": _ratio(summary.cached_tokens, prompt_tokens),
        "busy": _ratio(summary.busy_seconds, seconds),
        "mfu": machine.mfu(useful, seconds) if seconds > 0 else None,
        "chip_ms_per_token": _ratio(1e3 * machine.num_chips * seconds, summary.generated_tokens),
    }
    return _without_nan(figures)


def latency_rows(figures: dict[str, Any]) -> Iterable[tuple[str, Distribution]]:
    """The latencies of a report, to be printed."""
    for name, values in figures["latency"].items():
        mean, p50, p95, p99 = (math.nan if values[key] is None else values[key] for key in ("mean", "p50", "p95", "p99"))
        yield name, Distribution(values["count"], mean, p50, p95, p99)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
