"""Norms against float64, of rows that tell a careless form: massive activations, and a mean that lies far above the deviation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.buckets import runner_limits
from partinf.engine.step import DecodeRow, PageTable, RowSampling, Step
from partinf.execution.place import place_step
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.model.kinds import Block, Norm
from partinf.partition.sharding import device_mesh
from partinf.transformer import reference
from partinf.transformer.batch import pack
from partinf.transformer.linear import normalised
from partinf.transformer.routes import Routes
from partinf.transformer.step import compile_step, empty_state
from tests.execution.harness import MODEL, host_params, make_plan, place_params

SPOILT: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "a mean far above the deviation": lambda rng, shape: rng.normal(3e3, 1.0, shape),
    "massive activations": lambda rng, shape: np.where(rng.random(shape) < 0.05, 3e4, rng.normal(size=shape)),
}


def exactly(x: np.ndarray, by: Norm, eps: float = 1e-5) -> np.ndarray:
    """x [.., E] normalised in float64."""
    exact = x.astype(np.float64)
    exact = exact - exact.mean(-1, keepdims=True) if by.centred else exact
    return exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + eps)


@pytest.mark.parametrize("by", [Norm.RMS, Norm.LAYER])
def test_a_norm_of_whole_rows(by: Norm) -> None:
    rng, plan = np.random.default_rng(5), make_plan("8", make_layout({"x": "ffn"}, {"x": "heads"}))
    routes = Routes(plan, plan.buckets[0])
    for rows in SPOILT.values():
        given = rows(rng, (4, 64)).astype(np.float32)
        got = normalised(jnp.asarray(given), by, 1e-5, 64, (), routes)
        np.testing.assert_allclose(got, exactly(given, by), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("by", "padding"), [(Norm.RMS, 0), (Norm.LAYER, 0), (Norm.LAYER, 10)])
def test_a_norm_of_rows_in_parts_on_several_devices(by: Norm, padding: int) -> None:
    """Of the last device nothing is real where there is padding, and of the one before a part."""
    rng, plan = np.random.default_rng(5), make_plan("8", make_layout({"x": "ffn"}, {"x": "heads"}))
    routes, width = Routes(plan, plan.buckets[0]), 64 - padding
    real = np.arange(64).reshape(8, 8) < width if padding else None
    norm = jax.jit(
        jax.shard_map(
            lambda part: normalised(part, by, 1e-5, width, ("x",), routes, real),
            mesh=device_mesh(plan),
            in_specs=jax.P(None, "x"),
            out_specs=jax.P(None, "x"),
        )
    )
    for rows in SPOILT.values():
        given = rows(rng, (4, width)).astype(np.float32)
        got = norm(jnp.pad(jnp.asarray(given), ((0, 0), (0, padding))))[:, :width]
        np.testing.assert_allclose(got, exactly(given, by), atol=1e-3, rtol=1e-5)


def first_tokens(params: dict, model: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, V] of sequences of one token each, in float64: attention gives every query head the value of its key-value head."""
    wide = lambda leaf: np.asarray(leaf, np.float64)  # noqa: E731
    table, by, group = wide(params["embed"]), model.norm, model.num_heads // model.num_kv_heads

    def norm(x: np.ndarray, weights: dict, name: str) -> np.ndarray:
        normed = exactly(x, by, model.norm_eps) * wide(weights[name])
        return normed + wide(weights[f"{name}_bias"]) if by.biased else normed

    def attended(x: np.ndarray, layer: dict) -> np.ndarray:
        values = np.einsum("be,kqe->bkq", x, wide(layer["wkv"][1]))
        return np.repeat(values, group, axis=1).reshape(len(x), -1) @ wide(layer["wo"]).T

    def fed_forward(x: np.ndarray, layer: dict) -> np.ndarray:
        gate, up = np.einsum("be,cfe->cbf", x, wide(layer["w_in"]))
        return (gate / (1 + np.exp(-gate)) * up) @ wide(layer["w_out"]).T

    x = table[tokens]
    for layer in params["layers"]:
        first = norm(x, layer, "attention_norm")
        if model.block is Block.SERIAL:
            x = x + attended(first, layer)
            x = x + fed_forward(norm(x, layer, "ffn_norm"), layer)
        else:
            second = norm(x, layer, "ffn_norm") if model.block is Block.PARALLEL_TWO_NORMS else first
            x = x + attended(first, layer) + fed_forward(second, layer)
    return norm(x, params, "final_norm") @ table.T


@functools.cache
def spoilt_params(model: ModelConfig, how: str) -> dict:
    """The harness's parameters with such embeddings."""
    params = host_params(model)
    rows = SPOILT[how](np.random.default_rng(8), params["embed"].shape).astype(np.float32)
    return {**params, "embed": rows}


QUICK = [(Norm.RMS, Block.PARALLEL, False), (Norm.LAYER, Block.SERIAL, True)]
CASES = [(by, block, whole) for by in (Norm.RMS, Norm.LAYER) for block in Block for whole in (False, True)]


@pytest.mark.parametrize(("by", "block", "whole"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES])
def test_a_step_is_as_exact_as_on_one_device(by: Norm, block: Block, whole: bool) -> None:
    """The first tokens of all lanes, with what passes between sublayers split or whole."""
    model = dataclasses.replace(MODEL, name=f"{by}-{block}", norm=by, block=block)
    layout = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, {"x": "batch", "y": "heads", "z": "heads"}, decode_whole=whole)
    plan = make_plan("2x2x2", layout, model)
    (bucket,), mesh, limits = plan.buckets, device_mesh(plan), runner_limits(plan)
    step, tokens = compile_step(plan, mesh, bucket, True, with_logits=True), np.arange(8) * 31
    per_shard, held = bucket.decode_rows // plan.num_shards, plan.cache.pages_per_shard
    rows = []
    for lane, token in enumerate(tokens):
        shard, slot = divmod(lane, per_shard)
        rows.append(DecodeRow(lane, shard, int(token), 0, (PageTable((shard * held + slot,), 0),), RowSampling()))
    placed = place_step(Step(tuple(rows)), bucket, plan, limits)
    for how in SPOILT:
        params = spoilt_params(model, how)
        _, out = step(place_params(plan, mesh, params, True), empty_state(plan, mesh, True), pack([placed.batch]))
        got = np.asarray(out.logits)[list(placed.decode_rows), : model.vocab_size]
        want = first_tokens(params, model, tokens)[:, : model.vocab_size]
        alone = np.asarray(jax.jit(reference.forward, static_argnums=1)(params, model, jnp.asarray(tokens)[:, None]))[:, 0]
        assert np.abs(got - want).max() <= 2 * np.abs(alone - want).max() + 1e-6 * np.abs(want).max()
