"""Prompt tokens over the fresh keys of their own prompts, as a kernel for TPUs: a running softmax whose scores never leave the chip.

XLA's form, tile by tile, writes the scores of a tile to HBM and reads them again, several times over. Here a block of queries stays on the
chip while blocks of keys pass; pairs of blocks that no query sees (keys that come later, or of other prompts) are neither fetched nor
multiplied. Which pairs those are follows from the ends of both blocks, and the mask within a pair is exact.

Letters: T tokens, H query heads in groups of G per key-value head K, M keys, Q d_head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from partinf.foundation.rounding import round_up
from partinf.hardware.platform import KERNEL_KEYS, KERNEL_TILE, LANES, kernel_tokens

_MASKED, _LEAST = -1e30, -1e29  # as in `partinf.transformer.kernels.tiles`
_FAR = jnp.iinfo(jnp.int32).max


def prompt_attention(
    q: jax.Array,
    owner: jax.Array,
    position: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    key_owner: jax.Array,
    key_position: jax.Array,
    scale: float,
    cap: float = 0.0,
    window: int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of prompt tokens over those of the same owner up to their position.

    Args:
        q: [T, H, Q]. owner, position: [T]; owner -1 is padding. keys, values: [K, M, Q] of the tokens with `key_owner`, `key_position` [M].
        scale, cap, window: as in `tiles.Scores`. interpret: run without a TPU.

    Returns:
        [T, H, Q], 0 for tokens that saw nothing, and the logarithm of the sum of exp(score) [T, H], float32.
    """
    (tokens, heads, size), (groups, length, _) = q.shape, keys.shape
    each = heads // groups
    rows = min(kernel_tokens(each), round_up(tokens, KERNEL_TILE))
    wide = min(KERNEL_KEYS, round_up(length, LANES))
    padded, held = round_up(tokens, rows), round_up(length, wide)
    fill = lambda x, to, dim, value=0: jnp.pad(  # noqa: E731
        x, [(0, to - x.shape[dim]) if at == dim else (0, 0) for at in range(x.ndim)], constant_values=value
    )
    queries = fill(q.reshape(tokens, groups, each, size).transpose(1, 2, 0, 3), padded, 2)  # [K, G, T, Q]
    keys, values = fill(keys.astype(q.dtype), held, 1), fill(values.astype(q.dtype), held, 1)
    owner, position = fill(owner, padded, 0, -1), fill(position, padded, 0)
    key_owner, key_position = fill(key_owner, held, 0, -1), fill(key_position, held, 0)
    seen = _seen(owner, position, key_owner, key_position, rows, wide, window)
    count = held // wide
    of_keys = lambda group, row, block, seen: (group, jnp.where(seen[row * count + block] > 0, block, 0), 0)  # noqa: E731
    line = lambda group, row, block, seen: (0, block)  # noqa: E731
    column = lambda group, row, block, seen: (row, 0)  # noqa: E731
    mine = lambda group, row, block, seen: (group, 0, row, 0)  # noqa: E731
    out, mass = pl.pallas_call(
        functools.partial(_kernel, count=count, scale=scale, cap=cap, window=window),
        out_shape=(jax.ShapeDtypeStruct(queries.shape, q.dtype), jax.ShapeDtypeStruct((groups, each, padded, 1), jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(groups, padded // rows, count),
            in_specs=[
                pl.BlockSpec((1, each, rows, size), mine),
                pl.BlockSpec((1, wide, size), of_keys),
                pl.BlockSpec((1, wide, size), of_keys),
                *[pl.BlockSpec((rows, 1), column)] * 2,
                *[pl.BlockSpec((1, wide), line)] * 2,
            ],
            out_specs=(pl.BlockSpec((1, each, rows, size), mine), pl.BlockSpec((1, each, rows, 1), mine)),
            scratch_shapes=[pltpu.VMEM((each * rows, last), jnp.float32) for last in (1, 1, size)],
        ),
        interpret=interpret,
        name="prompt_attention",
    )(seen, queries, keys, values, owner[:, None], position[:, None], key_owner[None], key_position[None])
    out, mass = out[:, :, :tokens], mass[:, :, :tokens, 0]
    return out.transpose(2, 0, 1, 3).reshape(q.shape), mass.transpose(2, 0, 1).reshape(tokens, heads)


def _seen(
    owner: jax.Array, position: jax.Array, key_owner: jax.Array, key_position: jax.Array, rows: int, wide: int, window: int = 0
) -> jax.Array:
    """For every block of queries and every block of keys, one after the other, whether any may see any: 1 or 0, never 0 by mistake."""

    def ends(of: jax.Array, by: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        of, real = of.reshape(-1, size), by.reshape(-1, size) >= 0
        return jnp.min(jnp.where(real, of, _FAR), axis=1), jnp.max(jnp.where(real, of, -1), axis=1)

    first, last = ends(owner, owner, rows)
    key_first, key_last = ends(key_owner, key_owner, wide)
    (soonest, latest), (earliest, key_latest) = ends(position, owner, rows), ends(key_position, key_owner, wide)
    meet = (first[:, None] <= key_last[None]) & (key_first[None] <= last[:, None]) & (earliest[None] <= latest[:, None])
    if window:
        meet &= key_latest[None] > soonest[:, None] - window
    return meet.astype(jnp.int32).reshape(-1)


def _kernel(
    seen: Any, q: Any, keys: Any, values: Any, owner: Any, position: Any, key_owner: Any, key_position: Any, out: Any, mass: Any,
    top: Any, total: Any, added: Any, *, count: int, scale: float, cap: float, window: int,
) -> None:  # fmt: skip
    """One block of queries and one of keys. `top`, `total`, `added`: the running softmax of the block of queries."""
    row, block = pl.program_id(1), pl.program_id(2)
    _, each, rows, size = q.shape
    wide = keys.shape[1]

    @pl.when(block == 0)
    def _begin() -> None:
        top[...] = jnp.full(top.shape, _LEAST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        added[...] = jnp.zeros(added.shape, jnp.float32)

    @pl.when(seen[row * count + block] > 0)
    def _absorb() -> None:
        k, v = keys[0], values[0]
        scores = lax.dot_general(
            q[0].reshape(each * rows, size), k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        ) * scale  # fmt: skip
        scores = cap * jnp.tanh(scores / cap) if cap else scores
        visible = (owner[...] == key_owner[...]) & (key_position[...] <= position[...]) & (owner[...] >= 0)
        if window:
            visible &= key_position[...] > position[...] - window
        scores = jnp.where(visible[None], scores.reshape(each, rows, wide), _MASKED).reshape(each * rows, wide)
        highest = jnp.maximum(top[...], jnp.max(scores, axis=-1, keepdims=True))
        weights, fade = jnp.exp(scores - highest), jnp.exp(top[...] - highest)
        product = lax.dot_general(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        top[...] = highest
        total[...] = total[...] * fade + jnp.sum(weights, axis=-1, keepdims=True)
        added[...] = added[...] * fade + product

    @pl.when(block == count - 1)
    def _end() -> None:
        kept = jnp.maximum(total[...], jnp.finfo(jnp.float32).tiny)
        out[0] = (added[...] / kept).astype(out.dtype).reshape(each, rows, size)
        mass[0] = (top[...] + jnp.log(kept)).reshape(each, rows, 1)
