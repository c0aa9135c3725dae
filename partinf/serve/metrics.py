"""What Prometheus may ask: vLLM's meanings under our prefix, and the same again under vLLM's own names and labels.

Counts that the engine keeps are read on request; times are recorded once per request, when it has ended.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from partinf.engine.engine import Engine
from partinf.engine.metrics import GAP_BOUNDS
from partinf.engine.request import FinishReason, RequestOutput, RequestTimes

_PREFIX = "partinf:"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_GAPS = "inter_token_latency_seconds"

HISTOGRAMS = {
    "time_to_first_token_seconds": ("from arrival to the first token", _SECONDS),
    "request_time_per_output_token_seconds": ("mean of a request after its first token", _SECONDS),
    "e2e_request_latency_seconds": ("from arrival to the end", _SECONDS),
    "request_queue_time_seconds": ("from arrival to the first iteration", _SECONDS),
    "request_prefill_time_seconds": ("from the first iteration to the first token", _SECONDS),
    "request_decode_time_seconds": ("from the first token to the last", _SECONDS),
    "request_inference_time_seconds": ("from the first iteration to the last token", _SECONDS),
    "request_prompt_tokens": ("tokens of a prompt", _TOKENS),
    "request_generation_tokens": ("tokens generated for a request", _TOKENS),
}

# vLLM's names (docs.vllm.ai/en/v0.32.0/usage/metrics) are ours with its prefix. It has a label more, the number of the engine, and other
# words for ends that are no answers. Of its names these are ours alone.
_VLLM = "vllm:"
_ENGINE = {"engine": "0"}
_OURS = ("iterations",)
_REASONS = {FinishReason.CANCELLED: "abort", FinishReason.TIMEOUT: "abort", FinishReason.FAILED: "error"}


class ServerMetrics:
    """A registry of our own, for one engine and one server."""

    def __init__(self, engine: Engine, model: str) -> None:
        label, registry = ["model_name"], CollectorRegistry()
        registry.register(_EngineCollector(engine, model))
        self._histograms = {
            name: Histogram(_PREFIX + name, text, label, registry=registry, buckets=buckets).labels(model)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        ended = Counter(f"{_PREFIX}request_success", "requests that ended", ["model_name", "finished_reason"], registry=registry)
        self._ended = {reason: ended.labels(model, reason.value) for reason in FinishReason}  # from the start, so that rates are known
        self._shown = CollectorRegistry()
        self._shown.register(_WithTheirNames(registry.collect))

    def record(self, output: RequestOutput) -> None:
        """A request that ended."""
        times = output.times
        values = {
            "time_to_first_token_seconds": times.ttft,
            "request_time_per_output_token_seconds": times.time_per_token,
            "e2e_request_latency_seconds": times.completion_time,
            **_phases(times),
            "request_prompt_tokens": len(output.prompt),
            "request_generation_tokens": len(output.tokens),
        }
        for name, value in values.items():
            if value is not None:
                self._histograms[name].observe(value)
        self._ended[output.finish_reason].inc()

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._shown)


def _phases(times: RequestTimes) -> dict[str, float | None]:
    """Seconds of a request until its first iteration, its first token and its last; None where it did not come so far."""
    began, first, last = times.started, times.first_token, times.last_token
    return {
        "request_queue_time_seconds": None if began is None else began - times.arrival,
        "request_prefill_time_seconds": None if began is None or first is None else first - began,
        "request_decode_time_seconds": None if first is None or last is None else last - first,
        "request_inference_time_seconds": None if began is None or last is None else last - began,
    }


class _EngineCollector(Collector):
    """Gauges and counters that are the engine's own, and its times between tokens."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterator[Metric]:
        metrics, load = self._engine.metrics, self._engine.load
        gauges = {
            "num_requests_running": ("sequences that hold a slot", load.num_running),
            "num_requests_waiting": ("sequences that wait for one", load.num_waiting),
            "kv_cache_usage_perc": ("share of the KV pages in use; 1 is all", load.page_usage),
        }
        counters = {
            "num_preemptions": ("times that a sequence lost its pages", metrics.preemptions + metrics.swap_outs),
            "prompt_tokens": ("prompt tokens computed", metrics.prefill_tokens),
            "generation_tokens": ("tokens generated", metrics.generated_tokens),
            "prefix_cache_hits": ("prompt tokens found in the prefix cache", metrics.cached_tokens),
            "prefix_cache_queries": ("prompt tokens looked up there", metrics.cached_tokens + metrics.prefill_tokens),
            "iterations": ("steps run", metrics.iterations),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(_PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        yield self._gaps()

    def _gaps(self) -> Metric:
        seconds = self._engine.metrics.token_gap_seconds
        bounds = [*map(floatToGoString, GAP_BOUNDS), "+Inf"]
        counts = itertools.accumulate(self._engine.metrics.token_gaps)
        family = HistogramMetricFamily(_PREFIX + _GAPS, "between two tokens of a sample", labels=["model_name"])
        family.add_metric([self._model], list(zip(bounds, counts, strict=True)), seconds)
        return family


class _WithTheirNames(Collector):
    """What is collected elsewhere, under our names and vLLM's."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        for metric in self._collect():
            yield metric
            name = metric.name.removeprefix(_PREFIX)
            if name not in _OURS:
                renamed = Metric(_VLLM + name, metric.documentation, metric.type)
                renamed.samples = _with_their_labels(metric.samples)
                yield renamed


def _with_their_labels(samples: list[Sample]) -> list[Sample]:
    """The samples by vLLM's names and labels; those that it does not distinguish are added up."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], Sample] = {}
    for sample in samples:
        labels = sample.labels | _ENGINE
        if "finished_reason" in labels:
            reason = FinishReason(labels["finished_reason"])
            labels["finished_reason"] = _REASONS.get(reason, reason.value)
        name = _VLLM + sample.name.removeprefix(_PREFIX)
        key = name, tuple(labels.items())
        value = sample.value + (found[key].value if key in found and not name.endswith("_created") else 0)
        found[key] = sample._replace(name=name, labels=labels, value=value)
    return list(found.values())
