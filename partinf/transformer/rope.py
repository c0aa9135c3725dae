"""Rotary positions with Llama 3's frequency scaling, in the half-rotation form that Hugging Face checkpoints assume."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from partinf.model.config import ModelConfig


def frequencies(model: ModelConfig) -> np.ndarray:
    """Angular frequency of each of the Q/2 pairs, float32.

    Llama 3 keeps short wavelengths, divides long ones by `factor`, and interpolates between the two limits.
    """
    pairs = np.arange(0, model.head_dim, 2, dtype=np.float32) / np.float32(model.head_dim)
    plain = (1.0 / np.float32(model.rope_theta) ** pairs).astype(np.float32)
    scaling = model.rope_scaling
    if scaling is None:
        return plain
    wavelength = 2 * math.pi / plain
    cycles = scaling.original_max_len / wavelength
    keep = np.clip((cycles - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0)
    return (keep * plain + (1 - keep) * plain / scaling.factor).astype(np.float32)


class Rotation(NamedTuple):
    """Cosine and sine of the angles of every position [..., T, 1, Q/2], float32."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, freqs: np.ndarray) -> Rotation:
    """The angles at positions [..., T], each times the frequency of its pair."""
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(freqs).reshape((1,) * (positions.ndim + 1) + (-1,))
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate the pairs (i, i + Q/2) of the last dimension of x [..., T, heads, Q]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1).astype(x.dtype)
