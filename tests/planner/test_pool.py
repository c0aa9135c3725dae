"""The page pool is what memory holds: one account of it for all commands, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.results import read
from experiments.tpu_steps import code
from partinf import api
from partinf.buckets import Capacity, held, largest_step, served_capacity, with_capacity
from partinf.cli import main
from partinf.cost.memory import Room
from partinf.cost.pricing import Pricing
from partinf.foundation.errors import DoesNotFit, InvalidInput
from partinf.hardware.platform import memory_of_virtual_devices
from partinf.hardware.slices import on_this_machine, parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.planner.question import Question
from partinf.planner.report import answer
from partinf.planner.show.as_json import report_json
from partinf.plans import Bucket, Plan
from partinf.proof import proof_json, prove
from partinf.proof.process import Compiled
from partinf.simulation.sizing import Sizing, cost_runner, sized_plan
from partinf.workload import DType, Workload

MODELS = ("llama-3.1-8b", "llama-3-70b", "qwen-3-0.6b", "qwen-3-14b", "opt-13b", "palm-8b")
SLICES = ("v5e:4x4", "v4:2x2x2", "h200:8", "v6e:2x4")
WORKLOAD = Workload(16, 512, 512)


def split_heads(model: str, slice_: str, weights: DType = DType.BF16) -> Plan:
    """All axes split d_ff and heads."""
    where = parse_slice(slice_)
    roles = dict.fromkeys(where.axis_sizes, "ffn")
    return Plan(load_model_config(model), where, make_layout(roles, dict.fromkeys(roles, "heads")), weights)


def refused(plan: Plan, bucket: Bucket, *_: Any) -> Compiled:
    """What a compiler says that finds no program small enough, at once."""
    return Compiled("none", 0.0, {}, "", f"no room for {bucket} of {plan.model.name}")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partinf.proof.proving.compile_bucket", refused)
    monkeypatch.setattr("partinf.proof.unavailable", lambda *_: None)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("slice_", SLICES)
@pytest.mark.parametrize("model", MODELS)
def test_plan_proof_simulator_and_server_name_the_same_bytes(model: str, slice_: str) -> None:
    where = parse_slice(slice_)
    report = answer(Question(load_model_config(model), WORKLOAD), where)
    planned = report_json(replace(report, candidates=report.candidates[:1]))["served"]
    plan = report.plan
    served = with_capacity(plan, served_capacity(16, 1024))
    sizing = Sizing(max_rows=16, max_len=1024, prefill_tokens=256)
    simulated = sized_plan(plan, sizing)
    runner, price = cost_runner(plan, Pricing(where), sizing)
    proof = proof_json(prove(served, [largest_step(served)]))["planned_memory"]
    assert planned == held(served).as_json() == held(simulated).as_json() == proof
    pages = [group.pages_per_shard // plan.num_sequence_shards for group in runner.limits.groups]
    assert planned["cache"] == sum(count * size for count, size in zip(pages, price.page_bytes, strict=True))
    room = planned["usable"] - planned["weights"] - planned["code"] - planned["state"] - planned["activations"]
    assert planned["slack"] == room - planned["cache"] >= int(0.0999 * room)
    assert planned["slack"] < 0.1 * room + 2 * max(price.page_bytes)


@pytest.mark.usefixtures("no_compiler")
def test_commands_name_the_same_bytes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of Llama 3.1 8B at contexts of which the whole batch would not fit, from one saved plan."""
    file = str(tmp_path / "plan.toml")
    short = ["--model", "llama-3.1-8b", "--slice", "v5e:2x4", "--layout", "ws-1d", "--batch", "32", "--input", "24576", "--output", "8192"]

    def printed(*command: str) -> Any:
        assert main([*command, "--format", "json"]) == 0
        return json.loads(capsys.readouterr().out)

    proven = printed("prove", *short, "--as-served")["planned_memory"]
    assert main(["plan", "--model", "llama-3.1-8b", "--slice", "v5e:2x4", "--batch", "4", "--input", "512", "--save", file]) == 0
    assert "A server has " in capsys.readouterr().out
    size = ["--max-num-seqs", "32", "--max-model-len", "32768", "--requests", "2", "--lengths", "fixed:8:2"]
    simulated = printed("simulate", "--as-served", "--slice", "v5e:2x4", "--model", "llama-3.1-8b", "--layout", "ws-1d", *size)["memory"]
    assert simulated == proven
    assert 780_000 < proven["kv_tokens"] < 840_000
    half = printed(
        "simulate", "--as-served", "--slice", "v5e:2x4", "--model", "llama-3.1-8b", "--layout", "ws-1d", *size, "--memory-share", "0.45"
    )["memory"]
    assert half["kv_tokens"] == pytest.approx(proven["kv_tokens"] / 2, rel=1e-3)
    few = printed(
        "simulate", "--as-served", "--slice", "v5e:2x4", "--model", "llama-3.1-8b", "--layout", "ws-1d", *size, "--kv-pages", "2048"
    )["memory"]
    assert few["kv_tokens"] == 8 * 2048 * 16  # of eight shards


def test_one_chip_serves_what_it_cannot_hold_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    """At the defaults, in int8: contexts as long as the pages hold of one sequence, 32 sequences at a time."""
    plan = api.plan("llama-3.1-8b", "v5e:1x1", Workload(32, 1024, 1024, weights=DType.INT8), capacity=served_capacity(32, 0))
    assert plan.cache.num_slots == 32
    assert 40_000 < plan.max_len == held(plan).tokens < 131_072
    assert held(plan).slack > 0
    command = ["simulate", "--as-served", "--model", "llama-3.1-8b", "--slice", "v5e:1x1", "--weights", "int8", "--requests", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().err
    assert f"longest context: {plan.max_len:,} tokens, all that the KV cache holds; llama-3.1-8b supports 131,072" in printed
    assert "KV cache (up to 90% of the free memory)" in printed


def test_what_no_layout_holds_is_refused_with_its_bytes() -> None:
    with pytest.raises(DoesNotFit, match="does not fit v5e:2x2"):
        api.plan("llama-3-70b", "v5e:2x2", capacity=served_capacity(8, 1024))
    with pytest.raises(DoesNotFit, match=r"room for 0 tokens of KV per shard, and one request of 1024 tokens needs more; a larger slice"):
        with_capacity(split_heads("llama-3-70b", "v5e:2x2"), served_capacity(8, 1024))
    with pytest.raises(DoesNotFit, match=r"room for \d\d+ tokens of KV per shard, and one request of 131072 tokens needs more"):
        with_capacity(split_heads("llama-3.1-8b", "v5e:1x1", DType.INT8), served_capacity(8, 131072))


def test_what_is_out_of_range_is_refused_at_once() -> None:
    plan = split_heads("llama-3.1-8b", "v5e:2x4")
    with pytest.raises(InvalidInput) as caught:
        with_capacity(plan, Capacity(memory_share=1.5, kv_pages=-1, max_residents=-1))
    assert [offence.split(" = ")[0] for offence in caught.value.offences] == ["max_residents", "kv_pages", "memory_share"]
    where = parse_slice("v5e:2x4")
    parts = make_layout({"x": "ffn", "y": "ffn"}, {"x": "sequence", "y": "heads"})
    with pytest.raises(InvalidInput, match="kv_pages = 65; a multiple of 2 is needed"):
        with_capacity(Plan(plan.model, where, parts), Capacity(kv_pages=65, max_len=1024))


def test_flags_that_contradict_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    bad = ["--kv-pages", "4", "--memory-share", "0.5"]
    for command in (["bench"], ["generate", "--prompt", "x"], ["simulate", "--slice", "v5e:2x2"]):
        assert main([*command, "--model", "demo", *bad]) == 2
        assert "--memory-share 0.5: --kv-pages says how many pages there are" in capsys.readouterr().err
    assert main(["bench", "--model", "demo", "--memory-share", "0"]) == 2
    assert "--memory-share 0: " in capsys.readouterr().err
    assert main(["prove", "--model", "demo", "--slice", "v5e:2x2", "--kv-pages", "4"]) == 2
    assert "--as-served" in capsys.readouterr().err


def test_a_layout_is_found_for_fewer_sequences_in_the_cache() -> None:
    """A batch of which a sixteenth fits at full length has the layout of that sixteenth; one that fits has the layout that it had."""
    large = Workload(128, 16384, 16384)
    found = api.plan("llama-3.1-8b", "v5e:2x2", large, capacity=served_capacity(128, 32768))
    fewer = api.plan("llama-3.1-8b", "v5e:2x2", replace(large, resident=8), capacity=served_capacity(128, 32768))
    assert found.layout == fewer.layout
    assert found.cache.num_slots == 128
    assert held(found).tokens < 128 * 32768


def test_virtual_devices_leave_the_machine_its_memory() -> None:
    """Pages that sequences can fill and no more, of at most a quarter of what is left; and a named slice has no more than the machine."""
    plan = with_capacity(split_heads("qwen-3-0.6b", "cpu:2"), served_capacity(32, 8192))
    room = held(plan).room
    assert held(plan).cache <= 0.25 * room.left < held(plan).cache + 2 * held(plan).page_bytes[0]
    one = with_capacity(split_heads("qwen-3-0.6b", "cpu:2"), served_capacity(32, 40960))
    assert held(one).tokens == 40960  # more than a quarter, because that holds no sequence of this length
    small = with_capacity(split_heads("qwen-3-0.6b", "cpu:2"), served_capacity(2, 64))
    assert held(small).tokens == 2 * 64
    _, usable = memory_of_virtual_devices(1024)
    assert on_this_machine(parse_slice("cpu:1024")).chip.usable_hbm == usable
    assert on_this_machine(parse_slice("v5e:2x2")) == parse_slice("v5e:2x2")


def test_windows_have_what_their_sequences_take_and_the_first_group_the_rest() -> None:
    room = Room(usable=1000, weights=100, code=50, state=25, activations=25)
    assert room.left == 800
    assert room.divided(1.0, [10], [], 4, 20) == (80,)
    assert room.divided(0.5, [10], [], 4, 20) == (40,)
    assert room._replace(weights=2000).divided(1.0, [10], [], 4, 20) == (0,)
    # Windows keep 2 pages per sequence, and 3 while a prompt is computed.
    assert room.divided(1.0, [10, 20], [(2, 3)], 4, 20) == (58, 11)
    # No more windows than sequences that could fill them, which need as many pages in the first group.
    assert room.divided(1.0, [10, 20], [(2, 3)], 100, 4) == (26, 27)
    # One sequence of the longest context has to fit.
    assert room.divided(1.0, [10, 20], [(2, 3)], 100, 50) == (50, 15)
    assert room.divided(1.0, [20], [(2, 3)], 4, 0) == (40,)
    assert room.divided(1.0, [20, 10], [(4, 3), (1, 0)], 4, 0) == (35, 8)


def test_longer_contexts_have_three_sets_of_steps_at_most() -> None:
    """So that a step of ordinary requests carries no page tables of the longest."""
    plan = split_heads("llama-3.1-8b", "v5e:2x4")

    def contexts(max_len: int) -> list[int]:
        return sorted({bucket.decode_pages for bucket in with_capacity(plan, Capacity(max_len=max_len)).buckets})

    assert [contexts(length) for length in (256, 2048, 8192, 32768, 131072)] == [
        [16],
        [32, 128],
        [32, 128, 512],
        [128, 512, 2048],
        [128, 1024, 8192],
    ]


def test_code_of_layers_compiled_one_by_one_is_counted() -> None:
    """Every program of the plan counts, at what the compiler named of such layers and at most twice that; a loop has one layer's code."""
    plan = split_heads("llama-3.1-8b", "v5e:4x4")
    few = replace(plan, buckets=(Bucket(8, 4), Bucket(8, 4, 512, 8)))
    many = replace(plan, buckets=few.buckets * 4)
    platform = plan.slice.chip.platform
    assert held(many).room.code == len(many.buckets) * platform.code_bytes
    assert held(few).room.code == 2 * platform.code_bytes + plan.model.num_layers * sum((2, 2 + 5)) * 1_000_000
    for row in read(code.__file__, code.FILE).values():
        counted = platform.program_bytes(row["decode_rows"], row["prompt_tokens"], layers=1) - platform.code_bytes
        assert row["layer"] <= counted < 2 * row["layer"]
        assert row["rest"] < platform.code_bytes
