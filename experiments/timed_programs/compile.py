"""Compiles one decode step of jax-llm-examples' Llama 3 70B for 16 chips of v5e, from a checkout of that repository.

    python -m experiments.timed_programs.compile CHECKOUT COPIES BATCH CONTEXT OUT

Two to four minutes and 3 GB of memory; no TPU. Writes the compiled text, compressed. Besides this library's own `proof` extra it needs what
that repository imports: `etils` and `flatbuffers`.
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
from jax.sharding import AxisType, Mesh

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

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices)
    mesh = Mesh(devices.reshape(copies, KV_HEADS, CHIPS // copies // KV_HEADS), ("x", "y", "z"), axis_types=(AxisType.Explicit,) * 3)
    config = theirs.Config(**SIZES, max_seq_len=context, mesh=mesh)

    def described(tree: Any) -> Any:
        def one(info: Any) -> jax.ShapeDtypeStruct:
            sharding = theirs.logical_to_sharding(info.logical_axes, mesh, config.rules)
            return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)

        return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, theirs.ArrayInfo))

    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("x", None)))

    def step(tokens: Any, segments: Any, weights: Any, cache: Any) -> tuple[Any, Any]:
        logits, cache = theirs.forward(tokens, segments, weights, config, cache)
        return jax.reshard(jnp.argmax(logits, -1), jax.P()), cache

    weights, cache = described(theirs.Weights.abstract(config)), described(theirs.KVCache.abstract(config, batch))
    with jax.sharding.set_mesh(mesh):
        return str(jax.jit(step, donate_argnums=(3,)).lower(tokens, tokens, weights, cache).compile().as_text())


if __name__ == "__main__":
    text = compiled(sys.argv[1], *map(int, sys.argv[2:5]))
    with gzip.open(sys.argv[5], "wt") as file:
        file.write(text)
