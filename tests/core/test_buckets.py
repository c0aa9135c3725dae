"""The padded shapes that a plan compiles: few, and smaller where padding would cost time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from partinf.buckets import Capacity, serving_steps, with_capacity
from partinf.hardware.slices import parse_slice
from partinf.layout import make_layout
from partinf.model.config import load_model_config
from partinf.plans import Plan
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
        ("llama-3-8b", "v5e:2x2", DType.BF16, 160, [0, 40, 160]),  # half of them saves too little, a quarter enough
    ],
)
def test_a_smaller_prefill_where_it_saves_time(model: str, slice_: str, weights: DType, tokens: int, expected: list[int]) -> None:
    assert prefill_tokens(model, slice_, weights, Capacity(max_len=tokens, prefill_tokens=tokens, max_prompt_len=tokens - 1)) == expected


def test_chunks_of_long_prompts_fill_their_step() -> None:
    assert prefill_tokens("llama-125m", "cpu:1", DType.F32, Capacity(max_len=256, prefill_tokens=64)) == [0, 32, 64, 64]


def test_a_single_lane_runs_beside_an_empty_one() -> None:
    """On TPUs, where one row takes longer than two; the empty lane has no pages."""
    plan = Plan(
        load_model_config("llama-3-8b"), parse_slice("v5e:2x2"), make_layout({"x": "ffn", "y": "ffn"}, {"x": "heads", "y": "heads"})
    )
    wide = with_capacity(plan, Capacity(max_rows=1, max_len=1024))
    assert {bucket.decode_rows for bucket in wide.buckets} == {2}
    assert wide.cache.pages_per_shard == 1024 // 16
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
