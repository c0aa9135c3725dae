"""What Prometheus reads, against requests whose figures are known."""

from __future__ import annotations

import dataclasses
import re

from prometheus_client.parser import text_string_to_metric_families

from partinf.serve.metrics import HISTOGRAMS
from tests.serve.support import LIMITS, Serving, Slow, fake_serving, wait_until


def scrape(serving: Serving) -> dict[str, float]:
    """Values by name, the finished reason in brackets where there is one."""
    _, text, headers = serving.get("/metrics")
    assert headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "demo"
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


def test_every_metric_is_in_the_readme(fake: Serving, root: object) -> None:
    from pathlib import Path

    text = (Path(str(root)) / "README.md").read_text()
    shown = set(re.findall(r"`partinf:(\w+)`", text))
    kept = {re.sub(r"_(total|count|sum|created)$", "", name.partition(":")[2].partition("[")[0]) for name in scrape(fake)}
    assert {re.sub(r"_total$", "", name) for name in shown} >= kept | set(HISTOGRAMS)
