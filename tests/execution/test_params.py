"""Declarations: the bytes that they promise are those on the devices, and values do not depend on the mesh."""

from __future__ import annotations

import chex
import jax
import pytest

from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.partition.sharding import device_mesh
from partinf.plans import Bucket
from partinf.transformer.account import trace_account
from partinf.transformer.cache import cache_bytes_per_device
from partinf.transformer.params import params_bytes_per_device, random_params
from partinf.transformer.step import empty_state
from partinf.workload import DType
from tests.execution.harness import MODEL, make_plan

MESHES = (("8", {"x": "ffn"}), ("4x2", {"x": "replica", "y": "embed"}))
LAYOUTS = [
    make_layout({"x": "embed", "y": "ffn", "z": "replica"}, {"x": "heads", "y": "heads", "z": "batch"}),
    make_layout({"x": "replica", "y": "ffn", "z": "ffn"}, {"x": "sequence", "y": "heads", "z": "sequence"}),
]


def bytes_on(device: jax.Device, tree: object) -> int:
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == device)


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("unrolled", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["batch", "sequence"])
def test_declared_bytes_are_those_on_every_device(layout: Layout, unrolled: bool, dtype: DType) -> None:
    plan = make_plan("2x2x2", layout, dtype=dtype)
    mesh = device_mesh(plan)
    params, state = random_params(plan, mesh, unrolled), empty_state(plan, mesh, unrolled)
    assert {bytes_on(device, params) for device in mesh.devices.flat} == {params_bytes_per_device(plan)}
    assert {bytes_on(device, state.kv) for device in mesh.devices.flat} == {cache_bytes_per_device(plan)}


def test_random_weights_are_the_same_on_every_mesh() -> None:
    here = [make_plan(mesh, make_layout(roles, dict.fromkeys(roles, "batch"))) for mesh, roles in MESHES]
    trees = [random_params(plan, device_mesh(plan), unrolled=True, seed=4) for plan in here]
    chex.assert_trees_all_close(*jax.device_get(trees), rtol=1e-6)


def test_the_account_counts_loops_as_often_as_they_run() -> None:
    """2D weight-stationary, decode of 8 lanes: collectives per layer and their bytes, worked out by hand."""
    layout = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, {"x": "batch", "y": "batch", "z": "batch"})
    plan = make_plan("2x2x2", layout)
    account = trace_account(plan, Bucket(8, 8))
    layers, embed, ffn = MODEL.num_layers, MODEL.embed_dim, MODEL.ffn_dim
    found = {(c.op, c.axes, c.num_bytes): n for c, n in account.collectives.items() if c.dtype == "float32"}
    assert found["all-gather", ("y", "z"), 8 * embed // 2 * 4] == 2 * layers  # before attention and before the FFN
    assert found["reduce-scatter", ("x",), 2 * 8 * ffn // 4 * 4] == layers  # gate and up in one
    assert found["all-gather", ("x",), 8 * ffn // 4 * 4] >= layers
    assert found["all-to-all", ("y", "z"), 4 * 2 * MODEL.head_dim * 4] >= layers  # queries of 4 lanes, 2 heads
    linear = 8 * (2 * embed * 8 * 8 + 3 * embed * ffn) // 8 + 8 * 2 * (embed // 2) * 8  # q, o, FFN over 8 devices; kv over x and y
    attention = 2 * 8 * 4 * 4 * 8  # one lane, 8 heads, 16 positions, both products
    logits = 8 * embed * MODEL.padded_vocab_size // 8
    assert account.dot_flops == 2 * (layers * (linear + attention) + logits)
