"""Binding a layout to a model and a slice: everything that does not fit is found at once."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout.files import load_layout, make_layout
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.plans import Plan, layout_for
from partinf.workload import DType, Workload

MODEL = ModelConfig("small", 2, 64, 192, 8, 4, 8, 512)
SLICE = parse_slice("cpu:2x2x2")
LAYOUT = make_layout(
    {"x": "embed", "y": "ffn", "z": "ffn"}, dict.fromkeys("xyz", "batch"), dict.fromkeys("xyz", "heads"), prefill_gather=("x",)
)


def test_a_plan_knows_its_shards() -> None:
    plan = Plan(MODEL, SLICE, LAYOUT, prefill_from_tokens=64)
    assert plan.batch_axes == ("x", "y", "z")
    assert plan.num_shards == 8
    assert plan.ffn_phase(63) == LAYOUT.decode
    assert plan.ffn_phase(64) == LAYOUT.prefill
    assert plan.decode_row_multiple() == 8
    assert plan.prefill_slot_multiple() == 1
    assert plan.prefill_token_multiple() == 2


def test_all_offences_at_once() -> None:
    model = replace(MODEL, embed_dim=68, ffn_dim=190, num_heads=10, num_kv_heads=10)
    with pytest.raises(InvalidInput) as caught:
        Plan(model, SLICE, LAYOUT)
    text = str(caught.value)
    assert len(caught.value.offences) == 3
    for words in ("d_model E = 68", "d_ff F = 190", "query heads H = 10 does not divide over y:2·z:2·x:2", "padding to 16 adds"):
        assert words in text


def test_axes_of_another_slice() -> None:
    with pytest.raises(InvalidInput, match="axis 'z' is no axis of cpu:4x2"):
        Plan(MODEL, parse_slice("cpu:4x2"), LAYOUT)


def test_padded_heads() -> None:
    palm, slice_ = load_model_config("palm-540b"), parse_slice("v4:4x4x4")
    heads = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, dict.fromkeys("xyz", "heads"))
    with pytest.raises(InvalidInput, match="48 does not divide .* padding to 64 adds 1.782e\\+04 M parameters"):
        Plan(palm, slice_, heads)
    plan = Plan(palm, slice_, heads, padded_heads=64)
    assert plan.padded_model.num_heads == 64
    assert plan.padded_model.num_kv_heads == 1
    assert plan.runnable is None
    grouped = dataclasses.replace(MODEL, num_heads=12, num_kv_heads=4)
    in_groups = Plan(grouped, parse_slice("cpu:2x2x2"), LAYOUT, padded_heads=16)
    assert in_groups.runnable == "heads in groups, padded from 12 to 16"
    with pytest.raises(InvalidInput, match="cannot be padded to 40"):
        Plan(palm, slice_, heads, padded_heads=40)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch": 0, "input_len": 1}, "batch = 0"),
        ({"batch": 1, "input_len": -1}, "input = -1"),
        ({"batch": 1}, "prefill needs a prompt length"),
        ({"batch": 1, "input_len": 1, "phase": "both"}, "phase = 'both'"),
        ({"batch": 1, "input_len": 1, "max_latency": 0.0}, "must be positive"),
    ],
)
def test_impossible_workloads(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Workload(**arguments)  # type: ignore[arg-type]


def test_lengths_of_a_workload() -> None:
    workload = Workload(batch=2, input_len=100, output_len=50, kv=DType.INT8)
    assert workload.decode_context == 125
    assert workload.max_context == 150
    assert Workload(batch=2, context_len=64, phase="decode").decode_context == 64


def test_a_plan_shows_itself_in_one_line_and_tells_itself_from_others() -> None:
    plan = Plan(
        load_model_config("llama-3-8b"),
        parse_slice("v5e:2x2"),
        layout_for(parse_slice("v5e:2x2"), load_layout("ws-2d")),
        weights=DType.INT8,
    )
    text = repr(plan)
    assert text.startswith("<Plan of llama-3-8b on v5e:2x2 (x:2,y:2): E_x F_y, prefill ws-2d/")
    assert "weights int8, KV bf16, contexts to 2,048 tokens, 0 steps" in text
    assert "\n" not in text
    assert len(text) < 200
    other = replace(plan, model=replace(plan.model, norm_eps=1e-6))
    assert repr(other) == text
    assert repr(other.as_dict()) != repr(plan.as_dict())
    assert plan.as_dict("note").keys() == {field.name for field in dataclasses.fields(Plan)} - {"note"}
