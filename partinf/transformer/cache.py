"""The paged KV cache on the devices: its declaration, and reading and writing pages.

One layout for all phases, that of decode's attention: pages lie on the shard of the batch axes that owns the request, key-value heads
are split over the leading head axes as far as they divide. Keys and values of a position lie side by side:
[P.b, S, 2, K.k, Q] per layer, either one array per layer or all stacked on a leading layer dimension (behind `write` and `read`).
Page ids are global: shard · pages_per_shard + local id; -1 is no page.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from partinf.collectives import Axes
from partinf.errors import InvalidInput
from partinf.plan import Plan
from partinf.sharding import letter_axes, sharding
from partinf.workload import DType

_LETTERS = "P..C."


def cache_dtype(plan: Plan) -> jnp.dtype:
    """The cache's type.

    Raises:
        InvalidInput: for a storage type that can be planned but not run.
    """
    types = {DType.BF16: jnp.bfloat16, DType.F32: jnp.float32}
    if plan.kv not in types:
        raise InvalidInput(f"{plan.kv} KV can be planned but not run yet; runnable: {', '.join(types)}")
    return jnp.dtype(types[plan.kv])


def abstract_cache(plan: Plan, mesh: Mesh | AbstractMesh, unrolled: bool) -> Any:
    """The cache as `jax.ShapeDtypeStruct`s with shardings."""
    model = plan.model
    shape = (plan.cache.pages_per_shard * plan.num_shards, plan.cache.page_size, 2, model.num_kv_heads, model.head_dim)
    dtype = cache_dtype(plan)
    if unrolled:
        layer = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(plan, mesh, _LETTERS))
        return (layer,) * model.num_layers
    return jax.ShapeDtypeStruct((model.num_layers, *shape), dtype, sharding=sharding(plan, mesh, "." + _LETTERS))


def cache_bytes_per_device(plan: Plan) -> int:
    """Bytes of the cache that one device holds."""
    model, axes = plan.model, letter_axes(plan)["C"]
    heads = model.num_kv_heads // plan.ways(axes)
    per_token = 2 * heads * model.head_dim * cache_dtype(plan).itemsize
    return model.num_layers * plan.cache.pages_per_shard * plan.cache.page_size * per_token


def local_pages(pages: jax.Array, batch_axes: Axes, pages_per_shard: int) -> tuple[jax.Array, jax.Array]:
    """Global page ids as ids on this shard, and which of them this shard owns."""
    shard = lax.axis_index(batch_axes) if batch_axes else 0
    local = pages - shard * pages_per_shard
    return local, (pages >= 0) & (local >= 0) & (local < pages_per_shard)


def write(kv: Any, layer: Any, pages: jax.Array, offsets: jax.Array, owned: jax.Array, new: jax.Array) -> Any:
    """Store new [T, 2, K, Q] at (pages [T], offsets [T]) of a layer where `owned`; the rest is dropped."""
    array = kv[layer] if isinstance(kv, tuple) else kv
    slots = jnp.where(owned, pages, math.prod(array.shape))  # out of range: dropped
    if isinstance(kv, tuple):
        updated = array.at[slots, offsets].set(new.astype(array.dtype), mode="drop")
        return (*kv[:layer], updated, *kv[layer + 1 :])
    return array.at[layer, slots, offsets].set(new.astype(array.dtype), mode="drop")


def read(kv: Any, layer: Any, pages: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The contents [B, M, 2, K, Q] of page tables pages [B, pages]; ids must be local, entries out of range read some page."""
    if isinstance(kv, tuple):
        found = kv[layer].at[pages].get(mode="clip")
    else:
        found = kv.at[layer, pages].get(mode="clip")
    rows, count, size = found.shape[:3]
    return found.reshape(rows, count * size, *found.shape[3:]).astype(dtype)
