"""The engine's preemption and swapping on the real model, and `partinf bench`."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from partinf.buckets import Capacity, with_capacity
from partinf.checkpoint.hf import load_hf
from partinf.cli import main
from partinf.engine import Engine, FirstComeFirstServed, SamplingParams
from partinf.engine.estimates import Estimates
from partinf.engine.metrics import Metrics
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.execution.runner import JaxRunner
from partinf.foundation import resources
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.partition.sharding import device_mesh
from partinf.plans import Plan
from partinf.simulation.report import LatencyBounds, Machine, RunReport
from partinf.transformer.params import abstract_params
from partinf.workload import DType
from tests.cli.words import with_flags

ESTIMATES = Estimates(first_iteration=lambda tokens: 0.01, decode=0.01)
PROMPTS = [[3 + n, 5, 7, 9 + n] for n in range(8)]


def make_runner(slice_name: str, num_host_pages: int, unrolled: bool) -> JaxRunner:
    """Decode over batch, heads and sequence on the first, second and third axis; prefill over heads."""
    axes = list(parse_slice(slice_name).axis_sizes)
    decode = dict(zip(axes, ("batch", "heads", "sequence"), strict=False))
    layout = make_layout(dict.fromkeys(axes, "ffn"), decode, dict.fromkeys(axes, "heads") | dict.fromkeys(axes[2:], "none"))
    plan = Plan(load_model_config("demo"), parse_slice(slice_name), layout, weights=DType.F32, kv=DType.F32)
    plan = with_capacity(plan, Capacity(max_rows=8, max_len=32, prefill_tokens=32, page_size=4, max_prompt_len=16, random=False))
    plan = replace(plan, cache=replace(plan.cache, pages_per_shard=12))
    mesh = device_mesh(plan)
    params = load_hf(resources.find("models", "demo"), plan.model, abstract_params(plan, mesh, unrolled))
    return JaxRunner(plan, params, mesh, num_host_pages)


@pytest.mark.parametrize("slice_name, unrolled, lag", [("cpu:1", True, 0), ("cpu:2x2", False, 1), ("cpu:2x1x4", True, 1)])
def test_tokens_survive_preemption_and_swapping(slice_name: str, unrolled: bool, lag: int, nothing_compiles) -> None:
    runner = make_runner(slice_name, 40, unrolled)
    runner.warm_up()
    compiled = runner.num_compiled
    params = [SamplingParams(max_tokens=18 + n % 3, ignore_eos=True) for n in range(len(PROMPTS))]
    want = [Engine(runner).generate([prompt], one)[0].tokens for prompt, one in zip(PROMPTS, params, strict=True)]
    counts = []
    for eviction in (Eviction.RECOMPUTE, Eviction.REACTIVE, Eviction.PROACTIVE):
        policy = MultiLevelFeedbackQueue(ESTIMATES, 4, pages=Pages(eviction, None))
        engine = Engine(runner, policy=policy, lag=lag, check_invariants=True)
        with nothing_compiles():
            assert [output.tokens for output in engine.generate(PROMPTS, params)] == want
        counts.append((engine.metrics.preemptions, engine.metrics.swapped_in_pages))
    assert counts[0][0] > 0
    assert counts[1][1] > 0
    engine = Engine(runner, policy=FirstComeFirstServed(), lag=lag, check_invariants=True)
    assert [output.tokens for output in engine.generate(PROMPTS, params)] == want
    assert runner.num_compiled == compiled


def check_lanes(events: list[dict[str, Any]], num_steps: int) -> None:
    """No bar of a lane begins before the one before it has ended, and there are as many steps as iterations."""
    bars = sorted((each["pid"], each["tid"], each["ts"], each["dur"]) for each in events if each["ph"] == "X")
    assert sum(bar[0] == 0 for bar in bars) == num_steps
    for before, after in pairwise(bars):
        assert before[:2] != after[:2] or before[2] + before[3] <= after[2] + 1e-2, "in microseconds"


def keys(value: Any) -> Any:
    return {key: keys(each) for key, each in value.items()} if isinstance(value, dict) else None


def test_bench_and_simulate_print_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--model",
        "demo",
        "--slice",
        "cpu:1",
        "--arrivals",
        "gamma:200:2",
        "--lengths",
        "fixed:6:5",
        "--requests",
        "8",
        "--tpot",
        "900",
    ]
    labels = []
    for command in ("bench", "simulate"):
        assert main([command, *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        labels.append([line.split("  ")[0] for line in lines if "  " in line.strip()])
    assert labels[0] == labels[1]
    assert {"time to first token", "goodput, TPOT ≤ 900 ms", "queue, mean and longest", "MFU"} <= set(labels[0])
    wanted = keys(RunReport.of(Metrics(1), 1.0, 0, LatencyBounds(), Machine(1, 1, 1.0)).as_json())
    assert main(["simulate", *flags, "--format", "json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {key: keys(figures[key]) for key in wanted} == wanted


def test_bench_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["bench", "--model", "demo", "--slice", "cpu:1", "--arrivals", "backlog", "--requests", "12", "--scheduler", "orca"]
    assert main([*flags, "--lengths", "fixed:6:5", "--format", "json", "--trace", str(tmp_path / "trace.json")]) == 0
    figures = json.loads(capsys.readouterr().out)
    check_lanes(json.loads((tmp_path / "trace.json").read_text())["traceEvents"], figures["counters"]["iterations"])
    wanted = keys(RunReport.of(Metrics(1), 1.0, 0, LatencyBounds(), Machine(1, 1, 1.0)).as_json())
    assert {key: keys(figures[key]) for key in wanted} == wanted
    assert figures["requests"] == {"finished": 12, "refused": 0}
    assert figures["counters"]["generated_tokens"] == 60
    assert figures["compiled_while_serving"] == 0
    monkeypatch.setattr(
        "partinf.measure.estimates._page_seconds", lambda runner: 1e-6
    )  # on a busy machine computing again may seem cheaper
    swapping = ["--scheduler", "mlfq", "--eviction", "reactive", "--max-batch", "2", "--lengths", "fixed:6:20"]
    assert main([*with_flags(flags, *swapping), "--host-pages", "24", "--format", "json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["requests"]["finished"] == 12
    assert figures["host_pages"] == 24
    counters = figures["counters"]  # a request may end while its pages are out, by the token that was in flight when they left
    assert counters["swapped_out_pages"] >= counters["swapped_in_pages"] > 0
    assert figures["compiled_while_serving"] == 0
    assert main(with_flags(flags, *swapping)) == 2
    assert "--host-pages" in capsys.readouterr().err
    assert main([*flags, "--host-pages", "8"]) == 2
    assert "nothing is moved there" in capsys.readouterr().err
    assert main([*flags, "--eviction", "reactive", "--host-pages", "8"]) == 2
    assert "scheduler orca has no such choice" in capsys.readouterr().err
    assert main([*with_flags(flags, "--model", "llama-125m"), "--ttft", "x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
