"""Rotary positions, in the half-rotation form that Hugging Face checkpoints assume. Frequencies come from `partinf.model.rotation`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from partinf.model.rotation import Rotation


class Angles(NamedTuple):
    """Cosine and sine of the angles of every position [..., T, 1, D/2], times the rotation's amplitude, float32. D of the Q dimensions of a
    head are rotated. `growth` is what queries are multiplied by, [..., T, 1, 1]; None for nothing."""

    cos: jax.Array
    sin: jax.Array
    growth: jax.Array | None = None


def angles(positions: jax.Array, rotation: Rotation, head_dim: int, served: int) -> Angles:
    """The angles at positions [..., T], each times the frequency of its pair.

    Args:
        served: the longest context, in tokens, that the deployment serves; some rotations are chosen by it.
    """
    freqs = np.asarray(rotation.frequencies(head_dim, served), np.float32)
    turned = positions[..., None, None].astype(jnp.float32) * jnp.asarray(freqs).reshape((1,) * (positions.ndim + 1) + (-1,))
    cos, sin = jnp.cos(turned), jnp.sin(turned)
    if rotation.amplitude == 1.0:
        return Angles(cos, sin)
    return Angles(cos * np.float32(rotation.amplitude), sin * np.float32(rotation.amplitude))


def growth(positions: jax.Array, rotation: Rotation) -> jax.Array:
    """What queries at positions [..., T] are multiplied by, float32 [..., T, 1, 1]. Lanes without a token have a position below 0."""
    times = (jnp.maximum(positions, 0) // rotation.growth_every).astype(jnp.float32)
    return (1 + np.float32(rotation.query_growth) * jnp.log(1 + times))[..., None, None]


def rotate(x: jax.Array, by: Angles) -> jax.Array:
    """Rotate the pairs (i, i + D/2) of the first D of the last dimension of x [..., T, heads, Q]."""
    half = by.cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = [first * by.cos - second * by.sin, second * by.cos + first * by.sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1).astype(x.dtype)
