"""What Prometheus reads, against requests whose figures are known."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from partinf.engine import FakeRunner
from partinf.engine.engine import Engine
from partinf.engine.metrics import GAP_BOUNDS, Metrics
from partinf.engine.request import FinishReason, SamplingParams
from partinf.serve.metrics import HISTOGRAMS, ServerMetrics
from tests.serve.support import LIMITS, Serving, Slow, fake_serving, wait_until


def scrape(serving: Serving, prefix: str = "partinf:") -> dict[str, float]:
    """Values by name of those that have this prefix, the finished reason in brackets where there is one."""
    _, text, headers = serving.get("/metrics")
    assert headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "demo"
            assert sample.labels.get("engine") == ("0" if sample.name.startswith("vllm:") else None)
            if not sample.name.startswith(prefix):
                continue
            reason = sample.labels.get("finished_reason")
            if "le" not in sample.labels:
                found[sample.name + (f"[{reason}]" if reason else "")] = sample.value
    return found


def test_what_requests_leave_behind(fake: Serving) -> None:
    body = {"model": "demo", "prompt": [5] * 10, "max_tokens": 6, "ignore_eos": True}
    for _ in range(3):
        assert fake.post("/v1/completions", body | {"stream": False})[0] == 200
    assert fake.post("/v1/completions", body | {"n": 2, "max_tokens": 1})[0] == 200
    fake.wait_idle()
    found = scrape(fake)
    assert found["partinf:generation_tokens_total"] == 20
    assert found["partinf:request_success_total[length]"] == 5
    assert found["partinf:time_to_first_token_seconds_count"] == 5
    assert found["partinf:request_time_per_output_token_seconds_count"] == 3  # one token has no time between tokens
    assert found["partinf:request_generation_tokens_sum"] == 20
    assert found["partinf:request_prompt_tokens_sum"] == 50
    assert 0 < found["partinf:time_to_first_token_seconds_sum"] < found["partinf:e2e_request_latency_seconds_sum"]
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total")
    assert [found[f"partinf:{name}"] for name in gauges] == [0, 0, 0, 0]


def test_times_between_tokens_are_a_histogram() -> None:
    """Each token of a sample after its first counts once, with the time since the one before it; those of a step come together."""
    runner = Slow(LIMITS)
    runner.seconds = 0.03
    with fake_serving(runner) as serving:
        serving.post("/v1/completions", {"model": "demo", "prompt": [5] * 10, "max_tokens": 6, "ignore_eos": True, "n": 2})
        serving.wait_idle()
        found = scrape(serving)
        times = serving.engine.metrics.times
        _, text, _ = serving.get("/metrics")
    assert found["partinf:inter_token_latency_seconds_count"] == 10
    spent = sum(time.last_token - time.first_token for time in times)
    assert found["partinf:inter_token_latency_seconds_sum"] == pytest.approx(spent)
    buckets = [int(float(line.split()[-1])) for line in text.splitlines() if line.startswith("partinf:inter_token_latency_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert (buckets[-1], len(buckets)) == (10, len(GAP_BOUNDS) + 1)


def test_a_time_between_tokens_falls_into_the_bucket_that_holds_it() -> None:
    metrics = Metrics(1)
    metrics.record_gaps(100.0, {None: 3, 99.98: 2, 99.0: 1, 0.0: 1})
    counts = dict(zip((*GAP_BOUNDS, math.inf), metrics.token_gaps, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {0.025: 2, 1.0: 1, math.inf: 1}
    assert metrics.token_gap_seconds == pytest.approx(2 * 0.02 + 1.0 + 100.0)


def test_everything_is_there_under_vllms_names(fake: Serving) -> None:
    """With its label of the engine, and its words for ends that are no answers."""
    fake.post("/v1/completions", {"model": "demo", "prompt": [5] * 10, "max_tokens": 6, "ignore_eos": True})
    fake.wait_idle()
    ours, theirs = scrape(fake), scrape(fake, "vllm:")
    same = {name for name in theirs if not name.endswith("]")}
    assert {name: theirs[name] for name in same} == {name: ours[name.replace("vllm:", "partinf:")] for name in same}
    assert {name.replace("partinf:", "vllm:") for name in ours if "iterations" not in name and "[" not in name} == same
    assert {name for name in theirs if name.startswith("vllm:request_success_total")} == {
        f"vllm:request_success_total[{reason}]" for reason in ("stop", "length", "abort", "error")
    }
    offered = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total", "generation_tokens_total")
    offered += ("num_preemptions_total", "prefix_cache_hits_total", "prefix_cache_queries_total", "request_success_total[length]")
    offered += tuple(f"{name}_count" for name in (*HISTOGRAMS, "inter_token_latency_seconds"))
    assert [name for name in offered if f"vllm:{name}" not in theirs] == []


def test_ends_that_are_no_answers_are_aborts_and_errors_to_vllm() -> None:
    engine = Engine(FakeRunner(LIMITS))
    metrics = ServerMetrics(engine, "demo")
    output = engine.generate([[5]], SamplingParams(max_tokens=1))[0]
    for reason in FinishReason:
        metrics.record(dataclasses.replace(output, finish_reason=reason))
    counts = {
        (sample.name, sample.labels["finished_reason"]): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if "finished_reason" in sample.labels and sample.name.endswith("_total")
    }
    ours, theirs = "partinf:request_success_total", "vllm:request_success_total"
    assert counts == {(ours, reason.value): 1 for reason in FinishReason} | {
        (theirs, "stop"): 1,
        (theirs, "length"): 1,
        (theirs, "abort"): 2,
        (theirs, "error"): 1,
    }


def test_a_busy_engine_and_its_prefix_cache() -> None:
    import concurrent.futures

    runner = Slow(LIMITS)
    with fake_serving(runner, engine={"prefix_caching": True}) as serving:
        body = {"model": "demo", "prompt": [5] * 33, "max_tokens": 30, "ignore_eos": True}
        for cached in (0, 32):
            usage = serving.post("/v1/completions", body)[1]["usage"]
            assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (33, {"cached_tokens": cached})
        found = scrape(serving)
        assert found["partinf:prefix_cache_hits_total"] == 32
        assert found["partinf:prefix_cache_queries_total"] == 66
        runner.seconds = 0.01
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = [pool.submit(serving.post, "/v1/completions", body) for _ in range(12)]
            wait_until(lambda: scrape(serving)["partinf:num_requests_waiting"])
            found = scrape(serving)
            assert 0 < found["partinf:num_requests_running"] <= LIMITS.num_slots
            assert 0 < found["partinf:kv_cache_usage_perc"] <= 1
            assert [answer.result()[0] for answer in answers] == [200] * 12


def test_preemptions() -> None:
    """Together the requests need more pages than there are, so some lose theirs and begin again."""
    limits = dataclasses.replace(LIMITS, pages_per_shard=40)
    with fake_serving(Slow(limits)) as serving:
        body = {"model": "demo", "prompt": [[5, number] * 10 for number in range(6)], "max_tokens": 40, "ignore_eos": True}
        status, content, _ = serving.post("/v1/completions", body)
        assert (status, content["usage"]["completion_tokens"]) == (200, 240)
        assert scrape(serving)["partinf:num_preemptions_total"] == serving.engine.metrics.preemptions > 0


def test_every_metric_is_on_the_page_of_the_server(fake: Serving, root: object) -> None:
    from pathlib import Path

    text = (Path(str(root)) / "docs" / "serving.md").read_text()
    shown = set(re.findall(r"`partinf:(\w+)`", text))
    kept = {re.sub(r"_(total|count|sum|created)$", "", name.partition(":")[2].partition("[")[0]) for name in scrape(fake)}
    assert {re.sub(r"_total$", "", name) for name in shown} >= kept | set(HISTOGRAMS)
