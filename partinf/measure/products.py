"""One product with weights, and one pass over memory, on every device of a mesh at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from partinf.measure.timing import Call
from partinf.partition.quantize import quantize
from partinf.partition.sharding import WHOLE, over_all, platform_of, whole
from partinf.transformer.linear import dot
from partinf.workload import DType

_TYPES = {DType.F32: jnp.float32, DType.BF16: jnp.bfloat16}


def product_call(mesh: Mesh, rows: int, inputs: int, outputs: int, weights: DType, count: int) -> Call:
    """`count` products on each device, one after the other: [rows, inputs] with weights [outputs, inputs], each with weights of its own.

    They run as in a step (`partinf.transformer.linear.dot`): float32 sums, int8 weights scaled afterwards, each product waiting for the one
    before. On one device of several, weights are those of this device alone.
    """
    matrices = weight_matrices(mesh, inputs, outputs, weights, count)
    return products_call(mesh, rows, inputs, matrices, weights)


def weight_matrices(mesh: Mesh, inputs: int, outputs: int, weights: DType, count: int) -> tuple:
    """`count` random matrices [outputs, inputs] for every device, as `products_call` takes them."""
    act = _activations(weights)
    sharding = NamedSharding(mesh, over_all(mesh))

    def make(key: jax.Array) -> object:
        values = jax.random.normal(key, (mesh.size * outputs, inputs), jnp.float32) * inputs**-0.5
        return quantize(values, (-1,)) if weights is DType.INT8 else values.astype(act)

    made = jax.jit(make, out_shardings=sharding)
    return tuple(made(jax.random.key(number)) for number in range(count))


def products_call(mesh: Mesh, rows: int, inputs: int, matrices: tuple, weights: DType) -> Call:
    """Products of `rows` rows with each of these matrices, one after the other."""
    act, axes, platform = _activations(weights), over_all(mesh), platform_of(mesh)

    def chain(x: jax.Array, *matrices: object) -> jax.Array:
        for matrix in matrices:
            y = lax.optimization_barrier(dot("te,oe->to", x, matrix, platform=platform))  # whole, though little of it may be used
            # The next product waits for this one, and takes its values where the shapes agree.
            x = y if y.shape == x.shape else x.at[0, 0].set(y[0, 0])
        return x[:1, :1]

    specs = (WHOLE, *(jax.tree.map(lambda _: axes, matrix) for matrix in matrices))
    run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=specs, out_specs=over_all(mesh), check_vma=False))
    x = jax.device_put(jnp.ones((rows, inputs), act), whole(mesh))
    compiled = run.lower(x, *matrices).compile()
    return lambda: jax.block_until_ready(compiled(x, *matrices))


def memory_call(mesh: Mesh, num_bytes: int) -> Call:
    """Reading `num_bytes` on each device."""
    axes = over_all(mesh)
    make = jax.jit(lambda: jnp.ones((mesh.size * num_bytes // 4,), jnp.float32), out_shardings=NamedSharding(mesh, axes))
    run = jax.jit(jax.shard_map(lambda x: jnp.sum(x)[None], mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False))
    array = make()
    compiled = run.lower(array).compile()
    return lambda: jax.block_until_ready(compiled(array))


def _activations(weights: DType) -> jnp.dtype:
    return jnp.dtype(_TYPES.get(weights, jnp.bfloat16))
