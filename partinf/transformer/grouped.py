"""Rows sorted by their expert, and products of each with the matrix of its own expert.

Buffers have a static size, that of the worst case: a row for every token and every one of its experts that a device may hold. No row is
ever dropped; places beyond those that are taken hold rows that nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from partinf.partition.quantize import Quantized

_OF_STORED = lax.RaggedDotDimensionNumbers(((((1,), (2,)), ((), ()))), (0,), (0,))  # [rows, in] · [experts, out, in]


@dataclass(frozen=True)
class Sorted:
    """Rows in the order of their experts.

    Attributes:
        token: [R] of which row of the tokens each is a copy. expert: [R] the number of its expert among those held; that of some expert in
            places that are not taken. sizes: [X] rows of every expert; their sum may be less than R.
        place: [T, k] where the copy of a token for each of its experts lies; R for those that are not held.
    """

    token: jax.Array
    expert: jax.Array
    sizes: jax.Array
    place: jax.Array


def sorted_by_expert(experts: jax.Array, count: int) -> Sorted:
    """Sort the copies of T tokens by expert.

    Args:
        experts: [T, k] numbers among `count` experts held, all different in a row; `count` for those that are not held.
    """
    tokens, chosen = experts.shape
    rows = tokens * min(chosen, count)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0]), unique_indices=True)
    place = jnp.where(flat < count, place, rows).reshape(experts.shape)
    sizes = jnp.sum(flat[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)
    order = order[:rows]
    return Sorted(order // chosen, jnp.minimum(flat[order], count - 1), sizes, place)


def grouped_dot(x: jax.Array, weights: jax.Array | Quantized, rows: Sorted) -> jax.Array:
    """Rows [R, in] sorted by expert · matrices [X, .., in] → float32 [R, ..]; int8 weights are scaled by expert and output channel."""
    values = weights.values if isinstance(weights, Quantized) else weights
    flat = values.astype(x.dtype).reshape(values.shape[0], -1, values.shape[-1])
    out = lax.ragged_dot_general(x, flat, rows.sizes, _OF_STORED, preferred_element_type=jnp.float32)
    out = out.reshape(x.shape[0], *values.shape[1:-1])
    return out * weights.scale[rows.expert] if isinstance(weights, Quantized) else out


def added_up(out: jax.Array, weights: jax.Array, rows: Sorted) -> jax.Array:
    """The outputs [R, E] of every token's experts, each times its weight [T, k], summed: float32 [T, E]. What is not held adds nothing."""
    held = rows.place < out.shape[0]
    total = jnp.zeros((), jnp.float32)
    for number in range(rows.place.shape[1]):
        found = out.at[rows.place[:, number]].get(mode="clip").astype(jnp.float32) * weights[:, number, None]
        total = total + jnp.where(held[:, number, None], found, 0.0)
    return total
