"""What Prometheus may ask: vLLM's meanings under our prefix.

Counts that the engine keeps are read when somebody asks; times are recorded once per request, when it has ended.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from partinf.engine.engine import Engine
from partinf.engine.request import RequestOutput

_PREFIX = "partinf:"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

HISTOGRAMS = {
    "time_to_first_token_seconds": ("from arrival to the first token", _SECONDS),
    "request_time_per_output_token_seconds": ("mean of a request after its first token", _SECONDS),
    "e2e_request_latency_seconds": ("from arrival to the end", _SECONDS),
    "request_queue_time_seconds": ("from arrival to the first iteration", _SECONDS),
    "request_prompt_tokens": ("tokens of a prompt", _TOKENS),
    "request_generation_tokens": ("tokens generated for a request", _TOKENS),
}


class ServerMetrics:
    """A registry of our own, for one engine and one server."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, model))
        label, registry = ["model_name"], self._registry
        self._histograms = {
            name: Histogram(_PREFIX + name, text, label, registry=registry, buckets=buckets).labels(model)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._ended = Counter(f"{_PREFIX}request_success", "requests that ended", ["model_name", "finished_reason"], registry=registry)
        self._model = model

    def record(self, output: RequestOutput) -> None:
        """A request that ended."""
        times = output.times
        values = {
            "time_to_first_token_seconds": times.ttft,
            "request_time_per_output_token_seconds": times.time_per_token,
            "e2e_request_latency_seconds": times.completion_time,
            "request_queue_time_seconds": None if times.started is None else times.started - times.arrival,
            "request_prompt_tokens": len(output.prompt),
            "request_generation_tokens": len(output.tokens),
        }
        for name, value in values.items():
            if value is not None:
                self._histograms[name].observe(value)
        self._ended.labels(self._model, output.finish_reason.value).inc()

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Gauges and counters that are the engine's own."""

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
