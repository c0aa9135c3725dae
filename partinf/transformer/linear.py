"""What linear layers share: the dot product's types, the norm over a split E, and gathering weight shards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from partinf.collectives import Axes, Split, move, take_split
from partinf.transformer.params import Params
from partinf.transformer.routes import Routes


def dot(spec: str, x: jax.Array, weights: jax.Array) -> jax.Array:
    """An einsum that accumulates in float32 and returns the type of `x`."""
    return jnp.einsum(spec, x, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def norm(x: jax.Array, scale: jax.Array, axes: Axes, routes: Routes) -> jax.Array:
    """RMS norm of x [T, E.axes] with the whole scale [E]."""
    wide = x.astype(jnp.float32)
    squares = jnp.sum(wide * wide, axis=-1, keepdims=True)  # [T, 1] {axes unreduced}
    split = tuple(axis for axis in axes if routes.sizes[axis] > 1)
    if split:
        squares = lax.psum(squares, split)
    model = routes.plan.model
    normed = (wide * lax.rsqrt(squares / model.embed_dim + model.norm_eps)).astype(x.dtype)
    return normed * take_split(scale, 0, routes.weight_stored, axes, routes.sizes)[None, :]


def gather_weights(layer: Params, routes: Routes) -> Params:
    """The layer's weights with the shards of the phase's gathered axes brought together: F, H and K over f, E over e."""
    if not routes.phase.gather:
        return layer
    heads, kv, hidden = routes.head_digits, routes.kv_digits, routes.hidden_digits
    stored_kv = tuple(axis for axis in kv if axis in routes.ffn_stored)
    used_kv = tuple(axis for axis in kv if axis in routes.ffn)
    where = {  # leaf: digits and positions of its output-like dimension (H, K or F) and of E, and the axes that split the former
        "wq": (heads, 0, 2, routes.ffn_stored, routes.ffn),
        "wkv": (kv, 1, 3, stored_kv, used_kv),
        "wo": (heads, 1, 0, routes.ffn_stored, routes.ffn),
        "w_in": (hidden, 1, 2, routes.ffn_stored, routes.ffn),
        "w_out": (hidden, 1, 0, routes.ffn_stored, routes.ffn),
    }
    gathered = dict(layer)
    for name, (digits, row_dim, col_dim, stored, used) in where.items():
        frame = routes.frame(digits, routes.weight_stored, row_dim, col_dim)
        gathered[name] = move(layer[name], frame, Split(stored, routes.embed_stored), Split(used, routes.embed))
    return gathered
