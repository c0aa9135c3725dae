"""Rows that travel to the devices that hold one of their experts, and their outputs' way back (`partinf.layout.Dispatch.EXCHANGE`).

Routes are gathered first, so that every device along the axes of the exchange knows which rows go where. A row is sent once to every
device that holds any of its experts; what comes back is the weighted sum of these experts' outputs, and home adds up what came from
everywhere. Buffers hold the worst case, so no row is dropped:

    ragged    rows lie packed by destination, [T · min(k, ways), E] on the way out and [ways · T, E] where they arrive; what is taken of
              these is sent, by `jax.lax.ragged_all_to_all`
    padded    its plain twin for platforms without that: every row takes a place in every part of [ways, T, E], wanted there or not
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from partinf.hardware.platform import LANES
from partinf.partition.collectives import Axes
from partinf.transformer.linear import made_for
from partinf.transformer.routes import Routes


@dataclass(frozen=True)
class Routed:
    """Rows and their routes: [R, E], the experts [R, k] and their weights [R, k]; an expert beyond all stands for none."""

    rows: jax.Array
    experts: jax.Array
    weights: jax.Array


Back = Callable[[jax.Array], jax.Array]
"""Outputs of the rows that arrived, [R, E] → what home adds up of them, [T, E]."""


def sent(here: Routed, count: int, routes: Routes) -> tuple[Routed, Back]:
    """The rows that experts multiply on this device, in this phase on this platform, of those that were routed here.

    Args:
        here: rows [T, E]. count: of experts.
    """
    axes, platform = routes.experts.exchanged, made_for(routes)
    if not axes:
        return here, lambda out: out
    if platform is None or not platform.ragged_exchange:
        return _padded(here, axes, routes.ways(axes))
    below, rest = {}, count
    for axis in routes.experts.experts_stored:
        rest //= routes.sizes[axis]
        below[axis] = rest
    return _ragged(here, axes, [(below[axis], routes.sizes[axis]) for axis in axes], count)


def _padded(here: Routed, axes: Axes, ways: int) -> tuple[Routed, Back]:
    """Every row to every device: [ways · T, E]."""

    def moved(parts: jax.Array) -> jax.Array:
        return lax.all_to_all(parts, axes, split_axis=0, concat_axis=0, tiled=True)  # [ways, T, E]: part i to device i

    def back(out: jax.Array) -> jax.Array:
        parts = moved(out.reshape(ways, -1, out.shape[-1]))
        return jnp.sum(parts.astype(jnp.float32), axis=0).astype(out.dtype)

    rows = moved(jnp.broadcast_to(here.rows[None], (ways, *here.rows.shape)))
    return Routed(rows.reshape(-1, rows.shape[-1]), *_everywhere(here, axes)), back


def _ragged(here: Routed, axes: Axes, digits: Sequence[tuple[int, int]], none: int) -> tuple[Routed, Back]:
    """Every row to the devices alone that hold an expert of it: [ways · T, E], those that arrive first, by where they come from.
    Places where nothing arrives hold anything.

    Args:
        digits: for each axis what to divide the number of an expert by so that the coordinate of its device is left, modulo the second,
            the axis's size. none: an expert beyond all.
    """
    experts, weights = _everywhere(here, axes)  # [ways · T, k]
    me, (tokens, width), chosen = lax.axis_index(axes), here.rows.shape, experts.shape[1]
    ways = experts.shape[0] // tokens
    target = jnp.zeros_like(experts)  # the device that holds each expert
    for below, size in digits:
        target = target * size + experts // below % size
    wanted = jnp.any(target[:, :, None] == jnp.arange(ways)[None, None], axis=1).reshape(ways, tokens, ways)  # [from, T, to]
    sizes = jnp.sum(wanted, axis=1, dtype=jnp.int32)  # [from, to]
    begin_to, begin_from = _before(sizes, 1), _before(sizes, 0)  # where rows lie that are sent, and where they arrive
    out_size = tokens * min(chosen, ways)
    place, leaving = _packed(wanted[me].T, out_size)  # [to, T], and of every place (to, T) as one number
    _, arriving = _packed(wanted[:, :, me], ways * tokens)  # (from, T)
    # Rows travel as whole tiles: of rows that share a tile the compiler makes such tiles by itself, in several passes.
    apart = (width // LANES, LANES) if width % LANES == 0 else (width,)
    rows = lax.empty((ways * tokens, *apart), here.rows.dtype)
    leave = here.rows.reshape(tokens, *apart)[leaving % tokens]
    rows = lax.ragged_all_to_all(leave, rows, begin_to[me], sizes[me], begin_from[me], sizes[:, me], axis_name=axes)
    rows = rows.reshape(-1, width)
    taken = jnp.arange(ways * tokens) < jnp.sum(sizes[:, me])
    mine = target.reshape(ways, tokens, chosen)[me]
    place, first = jnp.take_along_axis(place.T, mine, axis=1), _first_of_equals(mine)  # [T, k]

    def back(out: jax.Array) -> jax.Array:
        found = lax.empty((out_size, *apart), out.dtype)
        out = out.reshape(-1, *apart)
        found = lax.ragged_all_to_all(out, found, begin_from[:, me], sizes[:, me], begin_to[:, me], sizes[me], axis_name=axes)
        found, total = found.reshape(-1, width), jnp.zeros((), jnp.float32)
        for number in range(chosen):
            part = found.at[place[:, number]].get(mode="clip").astype(jnp.float32)
            total = total + jnp.where(first[:, number, None], part, 0.0)
        return total.astype(out.dtype)

    return Routed(rows, jnp.where(taken[:, None], experts[arriving], none), weights[arriving]), back


def _everywhere(here: Routed, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Experts and weights [T, k] of all devices along the axes, [ways · T, k] each: one all-gather of their bits."""
    bits = jnp.concatenate([here.experts, lax.bitcast_convert_type(here.weights, jnp.int32)], axis=1)
    bits = lax.all_gather(bits, axes, axis=0, tiled=True)
    experts, weights = jnp.split(bits, 2, axis=1)
    return experts, lax.bitcast_convert_type(weights, jnp.float32)


def _packed(wanted: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Where wanted entries of a matrix come to lie one after the other, row by row, and which entry lies in each of `size` places."""
    flat = wanted.reshape(-1)
    place = jnp.cumsum(flat, dtype=jnp.int32) - 1
    entry = jnp.zeros(size, jnp.int32).at[jnp.where(flat, place, size)].set(jnp.arange(flat.shape[0]), mode="drop")
    return place.reshape(wanted.shape), entry


def _before(sizes: jax.Array, axis: int) -> jax.Array:
    """The sums of what comes before each."""
    return jnp.cumsum(sizes, axis=axis) - sizes


def _first_of_equals(numbers: jax.Array) -> jax.Array:
    """Which entries of [T, k] have no equal before them in their row."""
    equal = numbers[:, :, None] == numbers[:, None, :]
    before = jnp.arange(numbers.shape[1])
    return ~jnp.any(equal & (before[None, None] < before[None, :, None]), axis=2)
