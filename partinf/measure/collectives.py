"""One kind of collective over some axes of a mesh, with a payload of so many bytes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from partinf.cost.ledger import Op
from partinf.foundation.rounding import ceil_div
from partinf.measure.timing import Call
from partinf.partition.sharding import over_all


def collective_call(mesh: Mesh, op: Op, axes: tuple[str, ...], num_bytes: int, dtype: jnp.dtype, count: int) -> Call:
    """`count` collectives of a kind over these axes, one after the other; all groups of devices at once.

    Args:
        num_bytes: per device, as a ledger counts them: the output of an all-gather, the input of the others; rounded up to whole elements
            for every device of a group.
        count: 0 times what is around them.
    """
    dtype = jnp.dtype(dtype)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    each = max(1, ceil_div(num_bytes, dtype.itemsize * ways))
    held = each if op is Op.ALL_GATHER else each * ways

    def once(x: jax.Array) -> jax.Array:
        if op is Op.ALL_GATHER:
            return lax.all_gather(x, axes, tiled=True)
        if op is Op.REDUCE_SCATTER:
            return lax.psum_scatter(x, axes, tiled=True)
        if op is Op.ALL_TO_ALL:
            return lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)
        if op is Op.PERMUTE:
            return lax.ppermute(x, axes, [(each, each + 1) for each in range(ways - 1)])
        return lax.psum(x, axes)

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(count):
            # One element of the result, which is made whole, goes back in: the next collective waits, and copies nothing of its payload.
            x = x.at[0].set(lax.optimization_barrier(once(x))[0])
        return x

    spec = over_all(mesh)
    run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), donate_argnums=0)
    sharding = NamedSharding(mesh, spec)
    held_array = jax.jit(lambda: jnp.zeros((held * mesh.size,), dtype), out_shardings=sharding)()
    compiled = run.lower(jax.ShapeDtypeStruct(held_array.shape, dtype, sharding=sharding)).compile()

    def call() -> None:
        nonlocal held_array
        held_array = jax.block_until_ready(compiled(held_array))

    return call
