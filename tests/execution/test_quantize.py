"""int8: rounding, the same quantised model on every mesh, and what it does to answers."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.buckets import Capacity, with_capacity
from partinf.checkpoint import hf
from partinf.checkpoint.hf import load_hf
from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.demo_tasks import check, mixed_tasks
from partinf.engine.engine import Engine
from partinf.engine.request import SamplingParams
from partinf.execution.runner import JaxRunner
from partinf.foundation import resources
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.partition.quantize import Quantized, dequantize, quantize
from partinf.partition.sharding import device_mesh
from partinf.plans import Plan
from partinf.transformer.params import abstract_params, params_bytes_per_device, random_params
from partinf.workload import DType

DEMO = resources.find("models", "demo")
TWO_D = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, dict.fromkeys("xyz", "batch"), dict.fromkeys("xyz", "heads"))


def make_plan(slice_name: str, layout: Layout, weights: DType, kv: DType) -> Plan:
    return Plan(load_model_config("demo"), parse_slice(slice_name), layout, weights=weights, kv=kv)


def load(plan: Plan, unrolled: bool = False) -> dict:
    mesh = device_mesh(plan)
    return load_hf(DEMO, plan.model, abstract_params(plan, mesh, unrolled))


def test_rounding_is_to_the_nearest_level_and_equal_in_numpy_and_jax() -> None:
    weights = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    weights[2] = 0
    ours, theirs = quantize(weights, (0, 2)), quantize(jnp.asarray(weights), (0, 2))
    assert ours.scale.shape == (6,)
    assert np.abs(dequantize(ours, np.float32) - weights).max() <= ours.scale.max() / 2 * 1.0001
    np.testing.assert_array_equal(ours.values, np.asarray(theirs.values))
    np.testing.assert_array_equal(ours.scale, np.asarray(theirs.scale))


def test_the_quantised_model_is_the_same_on_every_mesh() -> None:
    layouts = {"cpu:1": make_layout({"x": "ffn"}, {"x": "heads"}), "cpu:2x2x2": TWO_D}
    one, eight = (load(make_plan(name, layout, DType.INT8, DType.BF16)) for name, layout in layouts.items())
    assert any(isinstance(leaf, Quantized) for leaf in jax.tree.leaves(eight, is_leaf=lambda x: isinstance(x, Quantized)))
    chex.assert_trees_all_equal(jax.device_get(one), jax.device_get(eight))


@pytest.mark.parametrize("unrolled", [False, True])
def test_loading_holds_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unrolled: bool) -> None:
    """Of a checkpoint in float32, a host never holds much more than what comes out of it in int8."""
    monkeypatch.setattr(hf, "_AT_ONCE", 1 << 16)
    model = ModelConfig("wide", 8, 128, 1024, 4, 2, 32, 250, tied_embeddings=True, max_len=64)
    whole = Plan(model, parse_slice("cpu:1"), make_layout({"x": "ffn"}, {"x": "heads"}), weights=DType.F32, kv=DType.F32)
    hf.save_hf(random_params(whole, device_mesh(whole), unrolled=True), model, tmp_path)
    plan = replace(whole, weights=DType.INT8)
    abstract, held = abstract_params(plan, device_mesh(plan), unrolled), params_bytes_per_device(plan)
    tracemalloc.start()
    try:
        params = hf.load_hf(tmp_path, model, abstract)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == held
    assert peak < 1.25 * held < 0.4 * params_bytes_per_device(whole)


@pytest.mark.parametrize(("weights", "kv"), [(DType.INT8, DType.BF16), (DType.INT8, DType.INT8)])
def test_the_demo_model_still_answers(weights: DType, kv: DType) -> None:
    plan = with_capacity(make_plan("cpu:2x2x2", TWO_D, weights, kv), Capacity(max_rows=32, max_len=64, prefill_tokens=128, random=False))
    engine = Engine(JaxRunner(plan, load(plan)), tokenizer=load_tokenizer(DEMO))
    tasks = list(mixed_tasks(100, seed=23))
    outputs = engine.generate([task.prompt for task in tasks], SamplingParams(max_tokens=32))
    assert sum(check(task, output.text) for task, output in zip(tasks, outputs, strict=True)) >= 95
