"""The padded shapes that a plan compiles: few, and smaller where padding would cost time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from partinf.buckets import Capacity, fit, runner_limits, serving_steps, smallest_first, wanted_by, with_capacity
from partinf.cost.pricing import Pricing
from partinf.engine.engine import Engine
from partinf.engine.fake_runner import FakeRunner
from partinf.engine.request import SamplingParams
from partinf.engine.step import DecodeRow, PageTable, PrefillChunk, RowSampling, Step
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Bucket, Plan
from partinf.simulation.sizing import Sizing, cost_runner
from partinf.simulation.step_price import StepPrice
from partinf.workload import DType, Workload


def prefill_tokens(model: str, slice_: str, weights: DType, capacity: Capacity) -> list[int]:
    """Of every bucket of a plan whose axes all split d_ff and heads."""
    where = parse_slice(slice_)
    axes = list(where.axis_sizes)
    plan = Plan(load_model_config(model), where, make_layout(dict.fromkeys(axes, "ffn"), dict.fromkeys(axes, "heads")), weights, weights)
    return [bucket.prefill_tokens for bucket in with_capacity(plan, capacity).buckets]


@pytest.mark.parametrize(
    ("model", "slice_", "weights", "tokens", "expected"),
    [
        ("llama-125m", "cpu:1", DType.F32, 128, [0, 64, 128]),  # every token costs time
        ("llama-3-8b", "v5e:2x2", DType.BF16, 96, [0, 96]),  # reading the weights takes as long for half of them
        ("llama-3-8b", "v5e:2x2", DType.BF16, 256, [0, 128, 256]),
        ("llama-3-8b", "v5e:2x2", DType.BF16, 176, [0, 44, 176]),  # half of them saves too little, a quarter enough
    ],
)
def test_a_smaller_prefill_where_it_saves_time(model: str, slice_: str, weights: DType, tokens: int, expected: list[int]) -> None:
    assert prefill_tokens(model, slice_, weights, Capacity(max_len=tokens, prefill_tokens=tokens, max_prompt_len=tokens - 1)) == expected


def test_chunks_of_long_prompts_fill_their_step() -> None:
    assert prefill_tokens("llama-125m", "cpu:1", DType.F32, Capacity(max_len=256, prefill_tokens=64)) == [0, 32, 64, 64]


def test_a_single_lane_runs_with_an_empty_one() -> None:
    """On TPUs, where one row takes longer than two; the empty lane has no pages."""
    plan = Plan(
        load_model_config("llama-3-8b"), parse_slice("v5e:2x2"), make_layout({"x": "ffn", "y": "ffn"}, {"x": "heads", "y": "heads"})
    )
    wide = with_capacity(plan, Capacity(max_rows=1, max_len=1024))
    assert {bucket.decode_rows for bucket in wide.buckets} == {2}
    assert wide.cache == with_capacity(plan, Capacity(max_rows=2, max_len=1024)).cache
    served, (bucket,) = serving_steps(plan, Workload(1, context_len=1024, phase="decode"))
    assert bucket.decode_rows == 2
    assert served.cache.pages_per_shard == 1024 // 16
    gpu = replace(plan, slice=parse_slice("h200:2x2"))
    assert serving_steps(gpu, Workload(1, context_len=1024, phase="decode"))[1][0].decode_rows == 1


def test_every_slot_of_a_prefill_holds_a_whole_prompt() -> None:
    layout = make_layout({"x": "ffn", "y": "ffn"}, {"x": "heads", "y": "batch"})
    plan = Plan(load_model_config("llama-3-8b"), parse_slice("v5e:2x2"), layout)
    _, (bucket,) = serving_steps(plan, Workload(1, input_len=512, phase="prefill"))
    assert (bucket.prefill_slots, bucket.prefill_tokens) == (2, 1024)


def plan_of(decode: dict[str, str], prefill: dict[str, str]) -> Plan:
    """The demo model on cpu:2x2 with these attention roles."""
    layout = make_layout({"x": "ffn", "y": "ffn"}, decode, prefill)
    return Plan(load_model_config("demo"), parse_slice("cpu:2x2"), layout, DType.F32, DType.F32)


def test_a_runner_and_its_simulation_have_the_same_limits() -> None:
    """A chunk runs where the axes that split requests in both phases agree with its owner: sequences of x = 0 on (0, 0) and (0, 1)."""
    plan = plan_of({"x": "batch", "y": "heads"}, {"x": "batch", "y": "batch"})
    run = runner_limits(with_capacity(plan, Capacity(max_rows=8, max_len=128, prefill_tokens=64)))
    simulated = cost_runner(plan, Pricing(plan.slice), Sizing(max_rows=8, max_len=128, prefill_tokens=64))[0].limits
    assert run.prefill_shards == simulated.prefill_shards == ((0, 1), (2, 3))
    for field in (
        "max_decode_rows_per_shard",
        "max_prefill_tokens",
        "page_size",
        "num_shards",
        "num_sequence_shards",
        "num_slots",
        "max_len",
    ):
        assert getattr(run, field) == getattr(simulated, field), field
    crossed = plan_of({"x": "batch", "y": "batch"}, {"x": "heads", "y": "batch"})
    assert runner_limits(with_capacity(crossed, Capacity())).prefill_shards == ((0,), (1,), (0,), (1,))
    alone = plan_of({"x": "heads", "y": "heads"}, {"x": "batch", "y": "heads"})
    assert runner_limits(with_capacity(alone, Capacity())).prefill_shards == ((0, 1),)


def test_a_simulator_prices_the_bucket_in_which_a_step_runs() -> None:
    """Blocks per shard: a chunk of 32 tokens on one of four prefill shards does not fit a bucket of 64, which has 16 for each."""
    plan = plan_of({"x": "heads", "y": "heads"}, {"x": "batch", "y": "batch"})
    buckets = smallest_first([Bucket(8, 8, 128, 4), Bucket(8, 8), Bucket(8, 8, 64, 4)])
    plan = replace(plan, buckets=buckets)
    chunk = PrefillChunk(0, 0, (1,) * 32, 0, (PageTable((0, 1)),), True, RowSampling())
    step = Step(prefill=(chunk,))
    assert fit(buckets, runner_limits(plan), step) == Bucket(8, 8, 128, 4)
    assert StepPrice(plan, Pricing(plan.slice), buckets=buckets).shape(step).prefill_tokens == 128
    apart = Step(prefill=tuple(replace(chunk, slot=shard, tokens=(1,) * 16, prefill_shard=shard) for shard in range(4)))
    assert fit(buckets, runner_limits(plan), apart) == Bucket(8, 8, 64, 4)


def test_a_bucket_holds_every_step_of_a_tick() -> None:
    """The fullest shard and the longest page table of any step count, and so does what any row asks for."""
    plan = plan_of({"x": "batch", "y": "heads"}, {"x": "heads", "y": "heads"})
    limits = runner_limits(with_capacity(plan, Capacity()))
    buckets = smallest_first([Bucket(8, 8), Bucket(4, 4), Bucket(8, 8, random=True)])
    row = DecodeRow(0, 0, 1, 5, (PageTable((0, 1)),), RowSampling())
    assert fit(buckets, limits, Step((row, row._replace(slot=1)))) == Bucket(4, 4)
    assert fit(buckets, limits, Step((row,)), Step(tuple(row._replace(slot=slot) for slot in range(3)))) == Bucket(8, 8)
    assert fit(buckets, limits, Step((row._replace(sampling=RowSampling(temperature=1.0)),))) == Bucket(8, 8, random=True)
    with pytest.raises(InvalidInput, match=r"no bucket holds decode 2 × 9 pages, greedy; there are: decode 4 × 4 pages, greedy \|"):
        fit(buckets, limits, Step((row._replace(position=9 * 16 - 1),)))


def test_known_prompts_want_the_buckets_of_their_steps_alone() -> None:
    layout = make_layout({"x": "ffn"}, {"x": "heads"})
    plan = Plan(load_model_config("llama-125m"), parse_slice("cpu:1"), layout, DType.F32, DType.F32)
    plan = with_capacity(plan, Capacity(max_rows=4, max_len=2048, prefill_tokens=512))
    found = {(bucket.decode_pages, bucket.prefill_tokens, bucket.prefill_pages) for bucket in wanted_by(plan, [5], 64)}
    assert found == {(32, 0, 0), (32, 256, 0)}
    assert len(wanted_by(plan, [300, 5], 64)) == 3
    assert set(wanted_by(plan, [1500], 64)) == set(plan.buckets)


@pytest.mark.parametrize("seed", range(4))
def test_no_step_of_known_prompts_needs_another_bucket(seed: int) -> None:
    plan = replace(plan_of({"x": "batch", "y": "heads"}, {"x": "batch", "y": "batch"}), model=load_model_config("llama-125m"))
    plan = with_capacity(plan, Capacity(max_rows=4, max_len=512, prefill_tokens=128))
    draw, limits, buckets = random.Random(seed), runner_limits(plan), smallest_first(plan.buckets)
    lengths = [draw.randint(1, draw.choice((8, 60, 400))) for _ in range(draw.randint(1, 6))]
    runner, needed = FakeRunner(limits), set()
    submit = runner.submit

    def record(step: Step) -> None:
        needed.add(fit(buckets, limits, step))
        submit(step)

    runner.submit = record  # type: ignore[method-assign]
    Engine(runner).generate([[1] * length for length in lengths], SamplingParams(max_tokens=12, ignore_eos=True))
    assert needed <= set(wanted_by(plan, lengths, 12))
