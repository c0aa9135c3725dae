"""Compiles one decode step of jax-llm-examples' Llama 3 70B for 16 chips of v5e, from a checkout of that repository.

    PYTHON experiments/timed_programs/compile.py CHECKOUT COPIES BATCH CONTEXT OUT

Half a minute to four minutes and 3 GB of memory; no TPU. Writes the compiled text, compressed. PYTHON has a jax that the checkout runs on,
its libtpu, and what that repository imports: `absl-py`, `etils` and `flatbuffers`; nothing of this library is needed.
"""

from __future__ import annotations

import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import gzip
from typing import Any

import jax
import jax.experimental.pallas.tpu as pallas_tpu
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# What the published model is, with int8 weights and cache as its README's figures were made.
SIZES = {
    "embed": 8192,
    "ffw_size": 28672,
    "q_heads": 64,
    "kv_heads": 8,
    "num_layers": 80,
    "head_dim": 128,
    "vocab_size": 128256,
    "causal": True,
    "use_prefill_attn_kernel": True,
    "use_decode_attn_kernel": True,
    "quant_layer": True,
    "quant_cache": True,
}
CHIPS, KV_HEADS = 16, 8


def compiled(checkout: str, copies: int, batch: int, context: int) -> str:
    """The compiled text of a greedy decode step. `context`: positions that the cache has room for."""
    sys.path.insert(0, f"{checkout}/llama3")
    if not hasattr(pallas_tpu, "repeat"):  # newer versions of jax have dropped it
        pallas_tpu.repeat = lambda x, count, axis: jnp.concatenate([x] * count, axis)
    from llama3_jax import model as theirs

    old = hasattr(jax.sharding, "use_mesh")  # as in jax 0.6.0
    within = jax.sharding.use_mesh if old else jax.sharding.set_mesh
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices)
    mesh = Mesh(devices.reshape(copies, KV_HEADS, CHIPS // copies // KV_HEADS), ("x", "y", "z"), axis_types=(AxisType.Explicit,) * 3)
    config = theirs.Config(**SIZES, max_seq_len=context, mesh=mesh)

    def described(tree: Any) -> Any:
        def one(info: Any) -> jax.ShapeDtypeStruct:
            sharding = theirs.logical_to_sharding(info.logical_axes, mesh, config.rules)
            return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)

        return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, theirs.ArrayInfo))

    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("x", None)))

    def step(tokens: Any, segments: Any, weights: Any, cache: Any) -> tuple[Any, Any]:
        logits, cache = theirs.forward(tokens, segments, weights, config, cache)
        return theirs.reshard(jnp.argmax(logits, -1), PartitionSpec()), cache

    room = (context,) if old else ()  # newer ones have it in their configuration
    weights, cache = described(theirs.Weights.abstract(config)), described(theirs.KVCache.abstract(config, batch, *room))
    with within(mesh):
        return str(jax.jit(step, donate_argnums=(3,)).lower(tokens, tokens, weights, cache).compile().as_text())


if __name__ == "__main__":
    text = compiled(sys.argv[1], *map(int, sys.argv[2:5]))
    with gzip.open(sys.argv[5], "wt") as file:
        file.write(text)
