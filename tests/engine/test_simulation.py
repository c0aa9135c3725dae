"""The cost runner's clock, its prices against the ledger, the requests that are drawn, and the loop that feeds them."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from partinf.buckets import held
from partinf.cli import main
from partinf.cost.calibration import calibration_for
from partinf.cost.pricing import Pricing
from partinf.cost.program import program_for
from partinf.cost.split import StepShape
from partinf.cost.step import step_ledger
from partinf.engine import Engine, FirstComeFirstServed, Orca, SamplingParams
from partinf.engine.step import DecodeRow, PageCopy, PageTable, PrefillChunk, RowSampling, Step
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.planner.report import search
from partinf.plans import Bucket, Plan
from partinf.simulation.arrivals import Arrival, chat_lengths, parse_arrivals, parse_lengths, read_trace
from partinf.simulation.cost_runner import CostRunner
from partinf.simulation.play import play
from partinf.simulation.schedule_trace import ScheduleTrace
from partinf.simulation.serving_plan import Traffic, iteration_seconds, most_prompts, serving_plan
from partinf.simulation.sizing import Sizing, cost_runner, sized_plan
from partinf.simulation.step_price import Price, StepPrice
from partinf.workload import Workload
from tests.cli.words import with_flags
from tests.engine.support import ROOMY, run_all

GREEDY = RowSampling()


def one_second(*steps: Step) -> Price:
    tokens = max(step.num_tokens for step in steps)
    return Price(1.0 if tokens else 0.0, tokens)


def row(slot: int, *pages: int) -> DecodeRow:
    return DecodeRow(slot, 0, 1, 0, (PageTable(pages),), GREEDY)


def plan_on(slice_name: str = "v4:2x2x2", **options: object) -> tuple[Plan, Pricing]:
    slice_ = parse_slice(slice_name)
    axes = list(slice_.axis_sizes)
    layout = make_layout(dict.fromkeys(axes, "ffn") | {axes[0]: "embed"}, dict.fromkeys(axes, "batch"), dict.fromkeys(axes, "heads"))
    plan = Plan(load_model_config("palm-8b"), slice_, layout, **options)  # type: ignore[arg-type]
    return plan, Pricing(slice_, calibration_for(slice_.chip))


@pytest.mark.parametrize(
    "shape",
    [
        StepShape(decode_rows=32, decode_context=1200),
        StepShape(prefill_tokens=2048, prefill_slots=4),
        StepShape(decode_rows=8, decode_context=64, prefill_tokens=512, prefill_slots=2, prefill_context=128),
    ],
)
def test_a_step_costs_what_its_ledger_says(shape: StepShape) -> None:
    plan, pricing = plan_on(prefill_from_tokens=100)
    price = StepPrice(plan, pricing)
    assert price.seconds(shape) == pytest.approx(step_ledger(price._split(shape)).seconds, rel=1e-12)


def test_a_step_is_priced_by_its_fullest_shard_and_mean_context() -> None:
    plan, pricing = plan_on()
    price = StepPrice(plan, pricing)
    rows = tuple(DecodeRow(slot, 3, 1, 99, (PageTable((0,)),), GREEDY) for slot in range(3))  # all on one shard of eight
    assert price(Step(rows)) == Price(price.seconds(StepShape(decode_rows=24, decode_context=100)), 24)


def test_a_bucket_is_priced_whole() -> None:
    plan, pricing = plan_on()
    price = StepPrice(plan, pricing, buckets=(Bucket(16, 8), Bucket(16, 8, 64, 2)))
    chunk = PrefillChunk(0, 0, (1,) * 5, 0, (PageTable((0,)),), True, GREEDY)
    assert price(Step((row(1, 0),))).seconds == price.seconds(StepShape(decode_rows=16, decode_context=128))
    assert price(Step(prefill=(chunk,))).tokens == 80
    with pytest.raises(InvalidInput, match="no bucket"):
        price(Step(prefill=(replace(chunk, start=4, tables=(PageTable((0, 1, 2)),)),)))


def rows_in_seconds(*steps: Step) -> Price:
    rows = max(step.num_rows for step in steps)
    return Price(float(rows), rows)


def test_stages_work_at_once_and_wait_for_the_longest() -> None:
    runner = CostRunner(replace(ROOMY, num_stages=2), rows_in_seconds, overhead_seconds=0.5)
    runner.submit(Step((row(0, 0), row(1, 1))))
    runner.submit(Step((row(2, 2),)))
    first, second = runner.collect(), runner.collect()
    assert first.stages == ((0.0, 2.0), (2.5, 4.5))
    assert second.stages == ((2.5, 3.5), (5.0, 6.0))  # its first tick is as long as the other step's second
    assert (first.seconds, second.seconds, runner.clock.now) == (5.0, 4.0, 6.5)
    assert runner.bubbles == pytest.approx(1 - 6 / 13)


def test_a_step_enters_between_two_ticks() -> None:
    runner = CostRunner(replace(ROOMY, num_stages=3), rows_in_seconds)
    runner.submit(Step((row(0, 0),)))
    assert runner.next_finish == 3.0
    runner.clock.advance_to(1.5)  # the second tick has begun, and nothing enters it
    runner.submit(Step((row(1, 1),)))
    assert runner.collect().stages[-1] == (2.0, 3.0)
    assert runner.collect().stages[0] == (2.0, 3.0)


def test_copies_run_during_the_compute() -> None:
    runner = CostRunner(replace(ROOMY, num_host_pages=8), one_second, page_seconds=(0.2, 0.3))
    runner.submit(Step((row(0, 0),), swap_out=(PageCopy((5, 6), (0, 1), 0),)))
    runner.collect()
    assert runner.clock.now == 1.0  # nothing of this step needs pages 5 and 6
    runner.submit(Step((row(0, 5),), swap_in=(PageCopy((5, 6), (0, 1), 0),)))
    runner.collect()
    assert runner.clock.now == pytest.approx(1.0 + 0.6 + 1.0)  # this one waits for both


def test_swaps_of_pages_that_are_still_on_their_way_out_wait() -> None:
    runner = CostRunner(replace(ROOMY, num_host_pages=8), one_second, page_seconds=(2.0, 0.5))
    runner.submit(Step((row(0, 0),), swap_out=(PageCopy((5,), (0,), 0),)))
    runner.submit(Step((row(1, 5),)))  # a new owner writes page 5, which is free when the copy is done
    runner.collect()
    runner.collect()
    assert runner.clock.now == pytest.approx(3.0)


def test_a_request_on_the_virtual_clock() -> None:
    runner = CostRunner(ROOMY, one_second)
    engine = Engine(runner, clock=runner.clock, check_invariants=True)
    assert play(engine, [Arrival(0.5, 4, 3), Arrival(1.0, 4, 1)], runner.clock) == 0
    # The second waits from 1.0 to 1.5, when the first one's iteration ends, and ends first.
    assert [(times.ttft, times.completion_time) for times in engine.metrics.times] == [(1.5, 1.5), (1.0, 3.0)]
    assert {times.arrival for times in engine.metrics.times} == {0.5, 1.0}
    assert runner.clock.now == pytest.approx(3.5)


def test_requests_that_do_not_fit_are_counted() -> None:
    runner = CostRunner(replace(ROOMY, num_slots=8), one_second)
    engine = Engine(runner, clock=runner.clock)
    assert play(engine, [Arrival(0.0, 4, 1)] * 300 + [Arrival(1.0, ROOMY.max_len, 1)], runner.clock) == 1
    assert engine.metrics.summary().num_finished == 300


def test_an_arrival_fills_the_pipeline_while_a_step_is_in_flight() -> None:
    runner = CostRunner(replace(ROOMY, num_stages=2), one_second)
    engine = Engine(runner, policy=Orca(1), clock=runner.clock, check_invariants=True)
    play(engine, [Arrival(0.0, 4, 1), Arrival(0.6, 4, 1)], runner.clock, next_finish=lambda: runner.next_finish)
    assert [times.finished for times in engine.metrics.times] == pytest.approx([2.0, 3.0])  # the second enters when the first moves on


def test_memory_decides_how_many_tokens_are_kept() -> None:
    plan, pricing = plan_on()
    sizing = Sizing(max_rows=32, max_len=2048, page_size=64)
    runner, price = cost_runner(plan, pricing, sizing)
    whole = held(sized_plan(plan, sizing))
    assert runner.limits.pages_per_shard * price.page_bytes[0] == whole.cache
    assert 0.8 * plan.slice.chip.usable_hbm < whole.cache + whole.room.weights < plan.slice.chip.usable_hbm
    with pytest.raises(InvalidInput, match="room for 0 tokens"):
        cost_runner(Plan(load_model_config("palm-540b"), plan.slice, plan.layout), pricing, Sizing())


def test_a_serving_plan_splits_no_batch_of_prompts_and_is_no_slower_than_its_decode_roles() -> None:
    slice_ = parse_slice("v4:4x2x2")
    plan = serving_plan(load_model_config("palm-62b"), slice_, Traffic(128, 1100, 260))
    assert plan.prefill_slot_multiple() == 1
    pricing = Pricing(slice_, calibration_for(slice_.chip))
    never = replace(plan, prefill_from_tokens=1 << 30)
    for length in (500, 5000, 10000):
        assert StepPrice(plan, pricing).prefill_seconds(length) <= StepPrice(never, pricing).prefill_seconds(length)


def test_a_prompt_lengthens_a_tick_on_every_stage_that_it_passes() -> None:
    """Stages share a tick only where prompts are on several of them; so prompts of a thousand tokens are better served without."""
    assert [most_prompts(mean, 1) for mean in (0.0, 0.5, 3.0, 5000.0)] == pytest.approx([0.0, 0.5, 3.0, 5000.0])
    assert most_prompts(1e-3, 4) == pytest.approx(4e-3, rel=1e-2)
    rng = random.Random(0)
    begun = [sum(rng.random() < 0.07 for _ in range(10)) for _ in range(20000)]
    drawn = statistics.mean(max(begun[tick : tick + 4]) for tick in range(len(begun) - 3))
    assert most_prompts(0.7, 4) == pytest.approx(drawn, rel=0.05)
    slice_ = parse_slice("v5e:4x4")
    plans = [
        Plan(load_model_config("llama-3-70b"), slice_, make_layout({"x": "ffn", "y": role}, {"x": "heads", "y": attention}))
        for role, attention in (("stage", "none"), ("ffn", "batch"))
    ]
    staged, whole = (iteration_seconds(plan, Pricing(slice_, calibration_for(slice_.chip)), Traffic(128, 1067, 257)) for plan in plans)
    assert staged > 1.3 * whole


def test_arrivals_and_lengths() -> None:
    lengths = parse_lengths("uniform:32-512:1-128")
    slow, fast = (parse_arrivals(f"poisson:{rate}", lengths, 4000, seed=3) for rate in (1, 10))
    assert [(a.input_len, a.output_len) for a in slow] == [(a.input_len, a.output_len) for a in fast]
    assert fast[-1].time == pytest.approx(400, rel=0.05)
    burst = parse_arrivals("gamma:10:4", lengths, 4000, seed=3)
    between = [b.time - a.time for a, b in itertools.pairwise(burst)]
    assert statistics.stdev(between) / statistics.mean(between) == pytest.approx(4, rel=0.2)
    assert {arrival.time for arrival in parse_arrivals("backlog", parse_lengths("fixed:7:3"), 5)} == {0.0}
    assert {arrival.input_len for arrival in parse_arrivals("backlog", parse_lengths("fixed:7:3"), 5)} == {7}
    rng = random.Random(0)
    chat = [chat_lengths(rng) for _ in range(20000)]
    assert statistics.mean(a for a, _ in chat) == pytest.approx(378, rel=0.03)
    assert statistics.mean(b for _, b in chat) == pytest.approx(415, rel=0.03)
    assert max(a + b for a, b in chat) <= 2048


@pytest.mark.parametrize("text", ["poisson", "poisson:0", "poisson:x", "gamma:1", "gamma:1:-1", "uniform:1", "trace:", "backlog:3"])
def test_bad_arrivals_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="valid: poisson:RATE, gamma:RATE:CV"):
        parse_arrivals(text, chat_lengths, 5)


@pytest.mark.parametrize("text", ["chat:3", "fixed:1", "fixed:0:1", "uniform:9-3:1-2", "uniform:1:2", "gauss:1:2"])
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=f"lengths '{text}'"):
        parse_lengths(text)


def test_traces(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:45.0000000,5,0\n")
    assert read_trace(path) == [Arrival(0.0, 5, 1), Arrival(pytest.approx(1.68059), 374, 44)]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,374,44\n")
    with pytest.raises(InvalidInput, match="line 2: yesterday,374,44 cannot be read"):
        read_trace(path)
    path.write_text("when,in\n1,2\n")
    with pytest.raises(InvalidInput, match="no column TIMESTAMP, ContextTokens, GeneratedTokens"):
        read_trace(path)


def test_the_trace_of_a_schedule(tmp_path: Path) -> None:
    trace, runner = ScheduleTrace(), CostRunner(ROOMY, one_second)
    engine = Engine(runner, policy=FirstComeFirstServed(), clock=runner.clock, on_step=trace.on_step)
    engine.add_request([1, 2], SamplingParams(max_tokens=3), "a")
    run_all(engine)
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    bars = {(event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"}
    assert bars == {
        ("prefill 2", 0.0, 1e6),
        ("decode 1", 1e6, 1e6),
        ("decode 1", 2e6, 1e6),
        ("a prefill", 0.0, 1e6),
        ("a decode", 1e6, 2e6),
    }


def test_simulate_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = [
        "simulate",
        "--model",
        "opt-13b",
        "--slice",
        "a100-40:1",
        "--scheduler",
        "mlfq",
        "--arrivals",
        "poisson:1",
        "--lengths",
        "fixed:50:10",
        "--requests",
        "20",
    ]
    assert main([*flags, "--format", "json", "--ttft", "500", "--trace", str(tmp_path / "t.json")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["requests"] == {"finished": 20, "refused": 0}
    assert figures["counters"]["generated_tokens"] == 200
    assert figures["goodput"]["share"] == 1.0
    assert 0 < figures["mfu"] < 0.5
    assert (tmp_path / "t.json").exists()
    assert main(flags) == 0
    assert "time to first token" in capsys.readouterr().out
    assert main([*with_flags(flags, "--scheduler", "mlfk"), "--alpha-ms", "soon", "--max-batch", "-3"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize(("slice_", "program"), [("a100-80:1", "tiled"), ("v4:1x1x1", "tiled")])
def test_what_is_simulated_is_the_program_for_which_layouts_are_chosen(
    slice_: str, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = parse_slice(slice_)
    flags = ["simulate", "--model", "opt-13b", "--slice", slice_, "--lengths", "fixed:50:2", "--requests", "1", "--format", "json"]
    assert main(flags) == 0
    simulated = json.loads(capsys.readouterr().out)["program"]
    chosen_for = search(load_model_config("opt-13b"), where, Workload(2, 16, 16)).program.name
    assert simulated == chosen_for == Pricing(where).program.name == program_for(where.chip).name == program
    assert main([*flags, "--program", "plain"]) == 0
    assert json.loads(capsys.readouterr().out)["program"] == "plain"


@pytest.mark.parametrize("arrivals", ["poisson:2", "gamma:2:3", "backlog", "trace"])
def test_simulate_takes_all_arrivals(arrivals: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    lines = [f"2024-01-01 00:00:{second:02},30,{4 + second}" for second in range(6)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    flags = ["simulate", "--model", "opt-13b", "--slice", "a100-40:1", "--scheduler", "orca", "--lengths", "fixed:30:6", "--requests", "6"]
    flags += ["--arrivals", f"trace:{path}" if arrivals == "trace" else arrivals]
    assert main([*flags, "--format", "json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["requests"] == {"finished": 6, "refused": 0}
    assert figures["counters"]["generated_tokens"] == (sum(range(4, 10)) if arrivals == "trace" else 36)
    assert main(flags) == 0
    table = capsys.readouterr().out
    for label in ("time to first token", "P99", "goodput", "queue, mean and longest", "preemptions", "swapped out", "prefix cache", "MFU"):
        assert label in table
