"""Rows sorted by their expert, and products of each with the matrix of its own expert.

Buffers have a static size, that of the worst case: a row for every token and every one of its experts that a device may hold. No row is
ever dropped; places beyond those that are taken hold rows that are never read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from partinf.hardware.platform import Grouped, Platform
from partinf.partition.quantize import Quantized
from partinf.transformer.kernels import choices
from partinf.transformer.kernels import cpu as cpu_kernels
from partinf.transformer.params import OneOf

_TOGETHER = 1 << 22  # elements of rows that are fetched at once
_OF_STORED = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))  # [rows, in] · [experts, out, in]


@dataclass(frozen=True)
class Sorted:
    """Rows in the order of their experts.

    Attributes:
        token: [R] of which row of the tokens each is a copy. expert: [R] the number of its expert among those held; that of some expert in
            places that are not taken. sizes: [X] rows of every expert; their sum may be less than R.
        place: [T, k] where the copy of a token for each of its experts lies; R for those that are not held. whole: all are held.
    """

    token: jax.Array
    expert: jax.Array
    sizes: jax.Array
    place: jax.Array
    whole: bool = False


def sorted_by_expert(experts: jax.Array, count: int, whole: bool = False) -> Sorted:
    """Sort the copies of T tokens by expert.

    Args:
        experts: [T, k] numbers among `count` experts held, all different in a row; `count` for those that are not held. whole: there are
            none such.
    """
    tokens, chosen = experts.shape
    rows = tokens * min(chosen, count)
    flat = experts.reshape(-1)
    order = stable_order(flat, count)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0]), unique_indices=True, wrap_negative_indices=False)
    place = (place if whole else jnp.where(flat < count, place, rows)).reshape(experts.shape)
    sizes = jnp.sum(flat[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)
    order = order[:rows]
    return Sorted(order // chosen, jnp.minimum(flat[order], count - 1), sizes, place, whole)


def stable_order(numbers: jax.Array, most: int) -> jax.Array:
    """The order that sorts numbers 0 … `most`, equal ones as they come. Each is sorted with its place as one number, where that fits, so
    that there is one array to sort instead of two."""
    copies = numbers.shape[0]
    if (most + 1) * copies > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(numbers, stable=True)
    return lax.sort(numbers.astype(jnp.int32) * copies + jnp.arange(copies, dtype=jnp.int32), is_stable=False) % copies


def grouped_dot(
    x: jax.Array, weights: jax.Array | Quantized | OneOf, rows: Sorted, dtype: Any, platform: Platform | None, name: str
) -> jax.Array:
    """Rows [R, in] sorted by expert · matrices [X, .., in] → [R, ..]; int8 weights are scaled by expert and output channel.

    Args:
        dtype: of the result; sums are float32. platform: that the program is made for, if for any. name: of the kernel that does it.
    """
    held, lead = (weights.layers, 1) if isinstance(weights, OneOf) else (weights, 0)
    inner = held.shape[lead + 1 : -1]
    how = Grouped.COMPILER if platform is None else platform.grouped
    if how is Grouped.TPU_KERNEL:
        from partinf.transformer.kernels import grouped_rows  # it takes a quarter of a second, which a CPU never needs

        if grouped_rows.fits(x, _apart(held, lead)):
            first = weights.index * held.shape[1] if isinstance(weights, OneOf) else 0
            out = grouped_rows.grouped_rows(x, _apart(held, lead), rows.sizes, first, dtype, name)
            return out.reshape(x.shape[0], *inner)
    flat = _flat(_sliced(weights))
    values = flat.values if isinstance(flat, Quantized) else flat
    if how is Grouped.CPU_KERNEL and cpu_kernels.fits_groups(x, values):
        out = cpu_kernels.grouped(x, values, rows.sizes, choices.current().of_blocks)
    else:
        out = lax.ragged_dot_general(x, values.astype(x.dtype), rows.sizes, _OF_STORED, preferred_element_type=jnp.float32)
    out = out * flat.scale[rows.expert] if isinstance(flat, Quantized) else out
    return out.astype(dtype).reshape(x.shape[0], *inner)


def _sliced(weights: jax.Array | Quantized | OneOf) -> jax.Array | Quantized:
    """The layer's own matrices."""
    if not isinstance(weights, OneOf):
        return weights
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, weights.index, keepdims=False), weights.layers)


def _flat(weights: jax.Array | Quantized) -> jax.Array | Quantized:
    """Matrices [X, .., in], those of an expert as one: [X, out, in], and their scales."""

    def merged(x: jax.Array, last: int) -> jax.Array:
        return x.reshape(x.shape[0], -1, *x.shape[x.ndim - last :])

    if not isinstance(weights, Quantized):
        return merged(weights, 1)
    return Quantized(merged(weights.values, 1), merged(weights.scale, 0), weights.contracted)


def _apart(weights: jax.Array | Quantized, lead: int) -> jax.Array | Quantized:
    """Matrices [(layers,) X, (I,) N, in] one expert after the other, [.., I, N, in], and their scales [.., I, N]."""

    def apart(x: jax.Array, outputs: int) -> jax.Array:
        each = math.prod(x.shape[lead + 1 : outputs])
        return x.reshape(math.prod(x.shape[: lead + 1]), each, *x.shape[outputs:])

    if not isinstance(weights, Quantized):
        return apart(weights, weights.ndim - 2)
    scale = weights.scale
    return Quantized(apart(weights.values, weights.values.ndim - 2), apart(scale, scale.ndim - 1), weights.contracted)


def added_up(out: jax.Array, weights: jax.Array, rows: Sorted, platform: Platform | None) -> jax.Array:
    """The outputs [R, E] of every token's experts, each times its weight [T, k], summed: float32 [T, E]. What is not held adds nothing.

    Args:
        platform: that the program is made for, if for any. Where every operation costs half a microsecond few rows are fetched together.
    """
    together = platform is not None and platform.grouped is Grouped.TPU_KERNEL and rows.place.size * out.shape[1] <= _TOGETHER
    if together and rows.whole:
        found = out.at[rows.place].get(mode="promise_in_bounds", wrap_negative_indices=False).astype(jnp.float32)  # [T, k, E]
        return jnp.sum(found * weights[..., None], axis=1)
    held = rows.place < out.shape[0]
    if together:
        found = out.at[rows.place].get(mode="clip", wrap_negative_indices=False).astype(jnp.float32) * weights[..., None]
        return jnp.sum(jnp.where(held[..., None], found, 0.0), axis=1)
    total = jnp.zeros((), jnp.float32)
    for number in range(rows.place.shape[1]):
        found = out.at[rows.place[:, number]].get(mode="clip", wrap_negative_indices=False).astype(jnp.float32) * weights[:, number, None]
        total = total + jnp.where(held[:, number, None], found, 0.0)
    return total
