"""Scores of given text equal the reference's log-probabilities, whole and in chunks, on any layout."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.buckets import Capacity, with_capacity
from partinf.checkpoint.hf import load_hf
from partinf.execution.score import Scorer
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.partition.sharding import device_mesh
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.transformer.params import abstract_params
from partinf.transformer.score import compile_score_step
from partinf.workload import DType

FIXTURE = Path(__file__).parent.parent / "fixtures" / "llama_gqa"
LAYOUTS = {
    "heads": make_layout({"x": "embed", "y": "ffn", "z": "replica"}, dict.fromkeys("xyz", "batch"), dict.fromkeys("xyz", "heads")),
    "batch": make_layout({"x": "ffn", "y": "ffn", "z": "ffn"}, {"x": "batch", "y": "heads", "z": "batch"}, prefill_gather=["x", "y"]),
    "sequence": make_layout(
        {"x": "embed", "y": "ffn", "z": "replica"},
        {"x": "sequence", "y": "sequence", "z": "batch"},
        {"x": "sequence", "y": "heads", "z": "batch"},
    ),
}


def make_scorer(layout: Layout, **capacity: int) -> Scorer:
    plan = Plan(load_model_config(FIXTURE), parse_slice("cpu:2x2x2"), layout, weights=DType.F32, kv=DType.F32, prefill_from_tokens=1)
    plan = with_capacity(plan, Capacity(**{"max_rows": 8, "max_len": 48, "page_size": 4} | capacity))
    mesh = device_mesh(plan)
    return Scorer(plan, load_hf(FIXTURE, plan.model, abstract_params(plan, mesh, unrolled=False)), mesh)


@pytest.mark.parametrize(("name", "prefill_tokens"), [("heads", 16), ("heads", 128), ("batch", 32), ("sequence", 16)])
def test_scores_are_the_references(name: str, prefill_tokens: int) -> None:
    expected = np.load(FIXTURE / "expected.npz")
    tokens, logits = expected["tokens"], expected["logits"]
    want = np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))
    texts = [tokens[row % 2, : 5 + 7 * row].tolist() for row in range(6)]
    scores = make_scorer(LAYOUTS[name], prefill_tokens=prefill_tokens).score(texts)
    for row, (text, got) in enumerate(zip(texts, scores.logprobs, strict=True)):
        places = np.arange(len(text) - 1)
        np.testing.assert_allclose(got, want[row % 2, places, text[1:]], atol=1e-4)
    assert scores.num_tokens == sum(len(text) - 1 for text in texts)
    assert scores.padded_tokens >= scores.num_tokens
    assert scores.mfu > 0


def test_nothing_of_tokens_times_vocabulary_exists() -> None:
    """In the compiled step: logits come in chunks, and no array has any device's tokens times its part of the vocabulary."""
    model = replace(load_model_config(FIXTURE), vocab_size=4000)
    plan = Plan(model, parse_slice("cpu:2x2x2"), LAYOUTS["heads"], weights=DType.F32, kv=DType.F32, prefill_from_tokens=1)
    bucket = Bucket(prefill_tokens=2048, prefill_slots=8)
    plan = replace(plan, cache=CacheConfig(16, 160, 8), buckets=(bucket,), max_len=512)
    program = compile_score_step(plan, device_mesh(plan), bucket, unrolled=False).as_text()
    sizes = {math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", program)}
    part = model.padded_vocab_size // 4  # tokens are split over z, the vocabulary over x and y
    assert 128 * part in sizes
    assert max(sizes) < (2048 // 2) * part / 2


def test_bad_texts_are_all_named() -> None:
    scorer = make_scorer(LAYOUTS["heads"], prefill_tokens=16)
    with pytest.raises(InvalidInput) as error:
        scorer.score([[1], [1, 96], list(range(60))])
    assert [offence.split(" has ")[0].split(" holds ")[0] for offence in error.value.offences] == ["text 1", "text 2", "text 3"]
