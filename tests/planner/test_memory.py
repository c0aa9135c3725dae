"""Bytes per device: Table 1 of the paper, parameter counts, and that no byte of a model is lost between devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partinf.cost.memory import kv_bytes, weight_bytes
from partinf.cost.split import StepShape
from partinf.foundation import resources
from partinf.hardware.slices import parse_slice
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.model.weights import num_params
from partinf.workload import DType
from tests.planner.support import layout_of, split_of

PARAMS = {
    "palm-8b": 8.63e9,
    "palm-62b": 62.50e9,
    "palm-540b": 540.36e9,
    "mt-nlg-530b": 529.5e9,
    "llama-3-8b": 8.03e9,
    "llama-3-70b": 70.6e9,
    "llama-3-405b": 405.85e9,
    "gpt3-175b": 174.6e9,
    "opt-175b": 174.6e9,
    "qwen-3-0.6b": 0.596e9,
    "qwen-3-1.7b": 1.7206e9,
    "qwen-3-4b": 4.022e9,
    "qwen-3-8b": 8.19e9,
    "qwen-3-14b": 14.77e9,
    "qwen-3-32b": 32.76e9,
    "llama-125m": 124.7e6,
}


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_counts(name: str) -> None:
    assert num_params(load_model_config(name)) == pytest.approx(PARAMS[name], rel=1e-3)


@pytest.mark.parametrize("name", resources.names("models"))
def test_every_model_names_its_source(name: str) -> None:
    assert load_model_config(name).source


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "attention", "longest"),
    [(128, 64, "heads", (1320, 330)), (256, 1, "heads", (660, 165)), (256, 1, "batch", (43_000, 10_700))],
    ids=["multihead over heads", "multiquery over heads", "multiquery over batch"],
)
def test_table_1(head_dim: int, kv_heads: int, attention: str, longest: tuple[int, int]) -> None:
    """Longest context of PaLM 540B on 64 chips with 30 % of the memory for keys and values; 48 heads are padded to 64."""
    model = replace(load_model_config("palm-540b"), head_dim=head_dim, num_heads=64, num_kv_heads=kv_heads)
    slice_ = parse_slice("v4:4x4x4")
    layout = layout_of({"x": "embed", "y": "ffn", "z": "ffn"}, attention)
    for batch, expected in zip((128, 512), longest, strict=True):
        per_token = kv_bytes(model, layout, slice_, batch, 1, DType.BF16, page_size=1)
        assert 0.3 * slice_.chip.hbm / per_token == pytest.approx(expected, rel=0.02)


def test_multihead_cache_of_three_terabytes() -> None:
    """A multihead 500B+ model at batch 512 and context 2048 (section 3.3): PaLM 540B with 48 kv heads of 128."""
    model = replace(load_model_config("palm-540b"), head_dim=128, num_kv_heads=48)
    whole = kv_bytes(model, layout_of({"x": "ffn"}, "heads"), parse_slice("cpu:1"), 512, 2048, DType.BF16)
    assert whole == pytest.approx(3e12, rel=0.02)


SMALL = ModelConfig("small", 2, 512, 2048, 16, 4, 32, 1000)
ROLES = st.sampled_from(["embed", "ffn", "replica"])


@settings(max_examples=60, deadline=None)
@given(st.tuples(ROLES, ROLES, ROLES), st.sampled_from(list(DType)), st.sampled_from([1, 2, 4, 16]))
def test_no_weight_is_lost(roles: tuple[str, str, str], weights: DType, kv_heads: int) -> None:
    """All devices together hold at least the model, and exactly one copy per replica where nothing else is replicated."""
    model = replace(SMALL, num_kv_heads=kv_heads)
    layout = layout_of(dict(zip("xyz", roles, strict=True)), "batch")
    split = split_of(model, "cpu:2x2x2", layout, StepShape(decode_rows=8, decode_context=16), weights=weights)
    held = 8 * weight_bytes(split)
    assert held >= num_params(model) * weights.num_bytes
    copies = 2 ** roles.count("replica")
    assert held >= copies * model.num_layers * 3 * model.embed_dim * model.ffn_dim * weights.num_bytes


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.sampled_from(["heads", "batch", "none"])] * 3), st.integers(1, 64), st.integers(1, 5000))
def test_no_key_is_lost(roles: tuple[str, str, str], rows: int, context: int) -> None:
    layout = layout_of({"x": "embed", "y": "ffn", "z": "ffn"}, dict(zip("xyz", roles, strict=True)))
    whole = SMALL.num_layers * rows * context * 2 * SMALL.num_kv_heads * SMALL.head_dim * 2
    assert 8 * kv_bytes(SMALL, layout, parse_slice("cpu:2x2x2"), rows, context, DType.BF16) >= whole
