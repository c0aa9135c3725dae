"""What CPUs do in C++ between the products of a layer, row by row (`cpu_rows.cc`): norms, gated activations, and what queries, keys and
values go through. Each has a plain twin where it is used, which runs on every other platform and in every case that is not taken here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from partinf.model.kinds import Activation, FeedForward
from partinf.transformer.kernels import cpu as cpu_kernels
from partinf.transformer.rope import Angles

_SIGMOIDS = {  # g · sigmoid(linear · g + cubic · g³)
    Activation.SILU: (1.0, 0.0),
    Activation.GELU_TANH: (2 * (2 / np.pi) ** 0.5, 2 * (2 / np.pi) ** 0.5 * 0.044715),
    Activation.GELU_SIGMOID: (1.702, 0.0),
}


def takes(x: jax.Array, size: int) -> bool:
    """Whether rows of so many numbers each are taken, and this machine has the kernels."""
    return x.dtype in (jnp.float32, jnp.bfloat16) and size % cpu_kernels.WIDTH == 0 and size > 0 and cpu_kernels.available()


def norm(x: jax.Array, weight: jax.Array, eps: float, offset: float, live: jax.Array | None) -> jax.Array:
    """x [T, E] / sqrt(mean of squares + eps) · (offset + weight [E]) in the type of x; 0 in rows that are not `live`."""
    call = jax.ffi.ffi_call(cpu_kernels.target("norm"), jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, weight.astype(x.dtype), _rows(live), eps=np.float32(eps), offset=np.float32(offset))


def takes_gated(hidden: jax.Array, of: FeedForward) -> bool:
    """Whether `gated` takes hidden [T, 2, F]."""
    plain = of.gated and of.activation in _SIGMOIDS and not of.clamp and not of.up_offset
    return plain and hidden.shape[1] == 2 and takes(hidden, hidden.shape[2])


def gated(hidden: jax.Array, of: FeedForward, live: jax.Array | None) -> jax.Array:
    """The activation of the gates times the other half, [T, 2, F] → [T, F]; 0 in rows that are not `live`."""
    linear, cubic = _SIGMOIDS[of.activation]
    call = jax.ffi.ffi_call(cpu_kernels.target("gated"), jax.ShapeDtypeStruct((hidden.shape[0], hidden.shape[2]), hidden.dtype))
    return call(hidden, _rows(live), linear=np.float32(linear), cubic=np.float32(cubic))


def takes_heads(x: jax.Array, by: Angles | None) -> bool:
    """Whether `heads` takes x [T, .., Q] and these angles."""
    whole = by is None or (by.cos.shape[-1] % cpu_kernels.WIDTH == 0 and by.cos.shape[:-1] == (x.shape[0], 1))
    return whole and takes(x, x.shape[-1])


def heads(x: jax.Array, by: Angles | None, weight: jax.Array | None, eps: float) -> jax.Array:
    """Heads [T, N, Q] normalised, where there is a weight [Q], and rotated, where there are angles [T, 1, D/2].

    Keys and values [T, 2, N, Q] likewise: values stay as they are, and where either is no number, the key becomes NaN and the value 0.
    """
    rows, size = x.shape[0], x.shape[-1]
    none = jnp.zeros((0, 0), jnp.float32)
    cos, sin = (none, none) if by is None else (by.cos.reshape(rows, -1), by.sin.reshape(rows, -1))
    flat = x.reshape(rows, -1, size)
    call = jax.ffi.ffi_call(cpu_kernels.target("heads"), jax.ShapeDtypeStruct(flat.shape, x.dtype))
    weight = jnp.zeros((0,), x.dtype) if weight is None else weight.astype(x.dtype)
    return call(flat, cos, sin, weight, eps=np.float32(eps), values=np.int32(x.ndim == 4)).reshape(x.shape)


def _rows(live: jax.Array | None) -> jax.Array:
    return jnp.zeros((0,), jnp.int32) if live is None else live.astype(jnp.int32)
