"""The keys of one sequence distributed round-robin over mesh axes: which device holds what, and how partial attention is combined.

Entry i of a sequence, a page of the cache or a token of a prompt, is on the device whose coordinates along these axes are the
digits of i modulo their product, major first. So all devices hold equally much of every sequence however it grows, and the entries of a
device that a query may see are always its first ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from partinf.partition.collectives import Axes


def local_entries(x: jax.Array, dim: int, order: Axes, axes: Axes, sizes: Mapping[str, int]) -> jax.Array:
    """The entries of dimension `dim` on this device's coordinates along `axes`, in order, when they are distributed over `order`."""
    head, tail, ways = x.shape[:dim], x.shape[dim + 1 :], [sizes[axis] for axis in order]
    kept = x.shape[dim] // math.prod(sizes[axis] for axis in axes)
    x = x.reshape(*head, x.shape[dim] // math.prod(ways), *ways, *tail)
    for place, axis in reversed(list(enumerate(order))):
        if axis in axes:
            x = lax.dynamic_index_in_dim(x, lax.axis_index(axis), dim + 1 + place, keepdims=False)
    return x.reshape(*head, kept, *tail)


def in_order(x: jax.Array, dim: int, ways: int) -> jax.Array:
    """The entries of dimension `dim` in order, where those of `ways` devices were put one device after the other."""
    head, tail = x.shape[:dim], x.shape[dim + 1 :]
    return x.reshape(*head, ways, -1, *tail).swapaxes(dim, dim + 1).reshape(x.shape)


def num_seen(count: jax.Array, pages: jax.Array, page_size: int) -> jax.Array:
    """How many of the first `count` [R] positions of a sequence lie in these pages [n] of it, given by their indices in order."""
    return jnp.sum(jnp.clip(count[:, None] - pages[None, :] * page_size, 0, page_size), axis=1)


def weighted(out: jax.Array, mass: jax.Array, axes: Axes, sizes: Mapping[str, int], sinks: jax.Array | None = None) -> jax.Array:
    """Attention over all keys [R, H, Q] {axes unreduced}, from that over the keys of each device.

    Args:
        out: [R, H, Q] over this device's keys alone. mass: [R, H] logarithm of the sum of exp(score) over them, float32.
        sinks: [H] a score of each head that takes its share of the mass and adds nothing.
    """
    split = tuple(axis for axis in axes if sizes[axis] > 1)
    if not split and sinks is None:
        return out
    whole = jax.nn.logsumexp(lax.all_gather(mass, split), axis=0) if split else mass  # of [ways, R, H]
    if sinks is not None:
        whole = jnp.logaddexp(whole, sinks.astype(jnp.float32)[None])
    return (out.astype(jnp.float32) * jnp.exp(mass - whole)[..., None]).astype(out.dtype)
