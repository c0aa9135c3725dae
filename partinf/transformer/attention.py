"""The attention sublayer between its projections: the core of each token group under the roles of its phase.

Axes as in `Routes`: t splits tokens and e, f split weights in the linear layers; b, h, s, k are a group's batch, head, sequence and
kv-head axes. Over s every device has the queries of its requests and attends to its part of their keys
(`partinf.transformer.kernels.round_robin`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from partinf.model.kinds import Attention, Norm, QkNorm
from partinf.model.rotation import Rotation
from partinf.partition.collectives import Axes, Split, move, take_split
from partinf.transformer import cache
from partinf.transformer.batch import Batch, DecodeBatch, PrefillBatch
from partinf.transformer.cache import KeysValues
from partinf.transformer.kernels import rows as row_kernels
from partinf.transformer.kernels import tiles as kernels
from partinf.transformer.kernels.round_robin import in_order, local_entries, num_seen, weighted
from partinf.transformer.linear import native_rows, normalised, row_by_row, scaled
from partinf.transformer.params import Params
from partinf.transformer.rope import Angles, angles, growth, rotate
from partinf.transformer.routes import Group, Routes

_LARGEST = float(jnp.finfo(jnp.bfloat16).max)  # that every type of a cache holds


class Rotations(NamedTuple):
    """How queries and keys of each token group are rotated, if they are: the same in all layers of a kind."""

    decode: Angles | None = None
    prefill: Angles | None = None


def rotations_of(batch: Batch, routes: Routes) -> tuple[Rotations, ...]:
    """The rotations of a step's positions for every kind of layer of the model.

    They are made whole, once: XLA would put the cosines of a token into the loop over its heads, in every layer. On CPU it does so behind a
    barrier too, but not with what they were stacked into.
    """
    model = routes.plan.model

    def of(positions: Any, group: Group, by: Rotation) -> Angles:
        mine = _rows(positions, group, routes)
        made: Any = angles(mine, by, model.head_dim, routes.plan.max_len)[:2]
        made = lax.optimization_barrier(jnp.stack(made) if routes.plan.slice.chip.platform.stacked_rotations else made)
        return Angles(*made, growth(mine, by) if by.query_growth else None)

    def both(by: Rotation | None) -> Rotations:
        if by is None:
            return Rotations()
        return Rotations(
            of(batch.decode.position, routes.decode, by) if routes.bucket.decode_rows else None,
            of(batch.prefill.position, routes.prefill, by) if routes.bucket.prefill_tokens else None,
        )

    distinct = {by: both(by) for by in dict.fromkeys(kind.attention.rotation for kind in model.layer_kinds)}
    return tuple(distinct[kind.attention.rotation] for kind in model.layer_kinds)


def attention(
    weights: Params,
    q: jax.Array,
    new: jax.Array,
    kv: Any,
    layer: Any,
    batch: Batch,
    routes: Routes,
    of: Attention,
    pages: int,
    rotations: Rotations,
) -> tuple[jax.Array, Any]:
    """Attention for all tokens of the step, between its products.

    Args:
        q: [T.t, H.f, Q] {e unreduced}. new: keys and values [T.t, 2, K.kf, Q] {e unreduced}.
        kv: the cache; this layer's pages receive the step's keys and values. of: the layer's kind of attention. pages: the group of the
            cache in which it lies.

    Returns:
        [T.t, HQ.f], and the updated cache.
    """
    lanes = routes.bucket.decode_rows // routes.ways(routes.tokens)
    # Both groups write before either reads: of pages that are read between two writes XLA makes a copy, in every layer.
    cores = []
    if routes.bucket.decode_rows:
        core, kv = _decode(weights, q[:lanes], new[:lanes], kv, layer, batch.decode, routes, of, pages, rotations.decode)
        cores.append(core)
    if routes.bucket.prefill_tokens:
        core, kv = _prefill(weights, q[lanes:], new[lanes:], kv, layer, batch.prefill, routes, of, pages, rotations.prefill)
        cores.append(core)
    outputs = [core(kv) for core in cores]
    out = jnp.concatenate(outputs) if len(outputs) > 1 else outputs[0]  # [T.t, H.f, Q]
    return row_by_row(out.reshape(out.shape[0], -1), routes), kv


def _decode(
    weights: Params,
    q: jax.Array,
    new: jax.Array,
    kv: Any,
    layer: Any,
    batch: DecodeBatch,
    routes: Routes,
    of: Attention,
    cached: int,
    by: Angles | None,
) -> tuple[Callable[[Any], jax.Array], Any]:
    """The cache with the keys and values of decode lanes, and what then reads it and gives their output."""
    group, size, table = routes.decode, routes.plan.cache.page_size, batch.tables[cached]
    position, pages = _rows(batch.position, group, routes), _rows(table.pages, group, routes)  # [B.b], [B.b, pages]
    if table.begin is not None:
        position = position - _rows(table.begin, group, routes)  # within the table, as all that follows
    q, new = _to_group(weights, q, new, of, by, group, routes)  # [B.b, H.h, Q], [B.b, 2, K.k, Q]
    pages, owned = cache.local_pages(pages, routes.plan, routes.plan.cache_groups[cached])
    row = jnp.arange(position.shape[0])
    current = jnp.maximum(position, 0) // size
    mine = owned[row, current] & (position >= 0)
    kv = kernels.write(kv, layer, pages[row, current], position % size, mine, KeysValues(new[:, 0], new[:, 1]), _tiles(routes))
    local = lambda x: local_entries(x, x.ndim - 1, group.sequence, group.sequence, routes.sizes)  # noqa: E731
    seen = num_seen(position + 1, local(jnp.arange(pages.shape[1])), size)  # of the pages of each lane on this device
    first = num_seen(jnp.maximum(position + 1 - of.window, 0), local(jnp.arange(pages.shape[1])), size) if of.window else None

    def core(kv: Any) -> jax.Array:
        read = lambda ids: _choose(cache.read(kv, layer, ids), group, routes)  # noqa: E731
        lying = _lying(kv, layer, local(pages), group, routes)
        found = kernels.decode(q, read, local(pages), seen - 1, _tiles(routes), lying, _scores(of), first)  # [B.b, H.h, Q]
        return _from_group(found, weights, group, routes)

    return core, kv


def _prefill(
    weights: Params,
    q: jax.Array,
    new: jax.Array,
    kv: Any,
    layer: Any,
    batch: PrefillBatch,
    routes: Routes,
    of: Attention,
    cached: int,
    by: Angles | None,
) -> tuple[Callable[[Any], jax.Array], Any]:
    """The same of prompt tokens."""
    group, plan = routes.prefill, routes.plan
    owner, position = _rows(batch.owner, group, routes), _rows(batch.position, group, routes)  # [T.b]
    q, new = _to_group(weights, q, new, of, by, group, routes)  # [T.b, H.h, Q], [T.b, 2, K.k, Q]

    # To the owners of the pages: batch axes that only prefill has are gathered, the others hold all that their requests need.
    shared, owners = routes.shared_batch, routes.decode
    frame = routes.frame(group.order, routes.kv_digits, 0, 2)
    for_cache = move(new, frame, Split(group.batch, group.kv), Split(shared, owners.kv))
    page = take_split(jnp.asarray(batch.page[cached]), 0, group.order, shared, routes.sizes)
    offset = take_split(jnp.asarray(batch.position), 0, group.order, shared, routes.sizes) % plan.cache.page_size
    local, owned = cache.local_pages(page, plan, plan.cache_groups[cached])
    kv = cache.write(kv, layer, local, offset, owned, KeysValues(for_cache[:, 0], for_cache[:, 1]))

    new, *where = (local_entries(x, 0, group.sequence, group.sequence, routes.sizes) for x in (new, owner, position))  # [T.bs, 2, K.k, Q]
    own = KeysValues(jnp.swapaxes(new[:, 0], 0, 1), jnp.swapaxes(new[:, 1], 0, 1))  # [K.k, T.bs, Q]
    fresh = kernels.Fresh(_choose(own, group, routes), *where)

    def core(kv: Any) -> jax.Array:
        chunks = batch.tables[cached].pages.shape[1] > 0
        context = _earlier(kv, layer, batch, cached, owner, position, of.window, routes, q.dtype) if chunks else None
        found = kernels.prefill(q, owner, position, fresh, context, _tiles(routes), _scores(of))  # [T.b, H.h, Q]
        return _from_group(found, weights, group, routes)

    return core, kv


def _earlier(
    kv: Any,
    layer: Any,
    batch: PrefillBatch,
    cached: int,
    owner: jax.Array,
    position: jax.Array,
    window: int,
    routes: Routes,
    dtype: jnp.dtype,
) -> kernels.Context:
    """What earlier steps stored of each slot's sequence, where its tokens attend: see `kernels.prefill`.

    Pages that lie there already are read in place; otherwise all of them are brought. Of those that are there a device attends to its
    part over the sequence axes that do not split them in the cache.
    """
    group, owners, sizes, table = routes.prefill, routes.decode, routes.sizes, batch.tables[cached]
    here, away = routes.sequence_here, routes.sequence_away
    more = tuple(axis for axis in group.sequence if axis not in here)
    again = lambda x, dim: local_entries(x, dim, more, more, sizes)  # noqa: E731
    slots = take_split(jnp.arange(routes.bucket.prefill_slots), 0, group.batch, group.batch, sizes)
    starts = jnp.asarray(batch.start)
    if table.begin is not None:  # places within the tables, which begin where the slots' windows do
        starts = starts - jnp.asarray(table.begin)
        position = position - jnp.asarray(table.begin).at[owner].get(mode="clip")
    starts = take_split(starts, 0, group.batch, group.batch, sizes)
    indices = again(local_entries(jnp.arange(table.pages.shape[1]), 0, owners.sequence, here, sizes), 0)
    stored = num_seen(starts, indices, routes.plan.cache.page_size)
    floor = num_seen(jnp.maximum(position + 1 - window, 0), indices, routes.plan.cache.page_size) if window else None
    pages = take_split(jnp.asarray(table.pages), 0, group.batch, routes.shared_batch, sizes)
    found_here = cache.local_pages(pages, routes.plan, routes.plan.cache_groups[cached])
    local, owned = (local_entries(x, 1, owners.sequence, owners.sequence, sizes) for x in found_here)
    if not away and routes.frame(group.batch, routes.kv_digits).same(routes.kv_cached, Split(group.batch, group.kv)):
        return _context(kv, layer, again(local, 1), slots, stored, floor, group, routes)
    found = kernels.dequantized(cache.read_pages(kv, layer, local), dtype)  # [S.s, pages, K.k', size, Q], right on the owner alone
    both = jnp.stack([found.keys, found.values], axis=1)
    both = again(_brought(jnp.where(owned[:, None, :, None, None, None], both, 0), routes), 2)  # [S.b, 2, pages, K.k, size, Q]
    count, _, length = both.shape[:3]
    brought = KeysValues(*(both[:, part].reshape(count * length, *both.shape[3:]) for part in (0, 1)))
    return _context((brought,), 0, jnp.arange(count * length).reshape(count, length), slots, stored, floor, group, routes)


def _context(
    kv: Any, layer: Any, pages: jax.Array, slots: jax.Array, starts: jax.Array, floor: jax.Array | None, group: Group, routes: Routes
) -> kernels.Context:
    read = lambda ids: _choose(cache.read(kv, layer, ids), group, routes)  # noqa: E731
    return kernels.Context(read, pages, slots, starts, _lying(kv, layer, pages, group, routes), floor)


def _brought(both: jax.Array, routes: Routes) -> jax.Array:
    """Pages [slots, 2, pages, K, size, Q] from where the cache has them, zeros elsewhere, to where prompt tokens attend to them.

    What is away over a sequence axis comes last, because it makes the payload grow: exchanged for slots or heads where the axis splits
    those, gathered elsewhere.
    """
    group, stored, away = routes.prefill, routes.decode.sequence, routes.sequence_away
    batch, kv = (tuple(axis for axis in axes if axis not in away) for axes in (group.batch, group.kv))
    both = move(both, routes.frame(group.batch, routes.kv_digits, 0, 3), routes.kv_cached, Split(batch, kv))
    left = tuple(axis for axis in stored if axis not in away or axis not in group.batch)
    both = move(both, routes.frame(group.batch, stored, 0, 2), Split(batch, stored), Split(group.batch, left))
    both = move(both, routes.frame(stored, routes.kv_digits, 2, 3), Split(left, kv), Split(routes.sequence_here, group.kv))
    return in_order(both, 2, routes.ways(away))


def _to_group(
    weights: Params, q: jax.Array, new: jax.Array, of: Attention, by: Angles | None, group: Group, routes: Routes
) -> tuple[jax.Array, jax.Array]:
    """Projected queries, keys and values as the group attends to them: moved, with bias, normalised and rotated as the kind has it."""
    q = move(q, routes.frame(group.order, routes.head_digits), routes.q_projected, Split(group.batch, group.heads))
    new = move(new, routes.frame(group.order, routes.kv_digits, 0, 2), routes.kv_projected, Split(group.batch, group.kv))
    if "bq" in weights:
        q = q + take_split(weights["bq"], 0, routes.head_digits, group.heads, routes.sizes)[None]
    if "bkv" in weights:
        new = new + take_split(weights["bkv"], 1, routes.kv_digits, group.kv, routes.sizes)[None]
    if of.qkv_clip:
        q, new = (jnp.clip(x, -of.qkv_clip, of.qkv_clip) for x in (q, new))
    if _by_kernel(weights, q, by, of, routes):
        own = {name: weights.get(name) if of.qk_norm is QkNorm.HEAD else None for name in ("q_norm", "k_norm")}
        eps = routes.plan.model.norm_eps
        return row_kernels.heads(q, by, own["q_norm"], eps), row_kernels.heads(new, by, own["k_norm"], eps)
    keys, values = new[:, 0], new[:, 1]
    if by is not None and of.qk_norm_rotated:
        q, keys = rotate(q, by), rotate(keys, by)
    if of.qk_norm is not QkNorm.NONE:
        q = _heads_normalised(q, weights, "q_norm", of, routes.head_digits, group.heads, routes)
        keys = _heads_normalised(keys, weights, "k_norm", of, routes.kv_digits, group.kv, routes)
    if by is not None and not of.qk_norm_rotated:
        q, keys = rotate(q, by), rotate(keys, by)
    if by is not None and by.growth is not None:
        q = q * by.growth.astype(q.dtype)
    return q, _contained(keys, values)


def _by_kernel(weights: Params, q: jax.Array, by: Angles | None, of: Attention, routes: Routes) -> bool:
    """Whether a kernel for CPUs does what is left of `_to_group`."""
    normed = of.qk_norm is QkNorm.HEAD and not of.qk_norm_bias and routes.plan.model.norm is Norm.RMS and "q_norm" in weights
    plain = (of.qk_norm is QkNorm.NONE or normed) and not of.qk_norm_rotated and (by is None or by.growth is None)
    return plain and native_rows(routes) and row_kernels.takes_heads(q, by)


def _heads_normalised(x: jax.Array, weights: Params, name: str, of: Attention, digits: Axes, split: Axes, routes: Routes) -> jax.Array:
    """Queries or keys [T.b, heads.split, Q] normalised: each head for itself, or all of a token together, which sums over `split`."""
    model = routes.plan.model
    if of.qk_norm is QkNorm.WIDTH:
        width = (model.num_heads if name == "q_norm" else model.num_kv_heads) * of.head_dim  # padded heads are 0
        real = routes.real_heads(name == "q_norm", split)
        parts = None if real is None else np.repeat(real, of.head_dim, axis=-1)
        flat = normalised(x.reshape(x.shape[0], -1), model.norm, model.norm_eps, width, split, routes, parts)
        normed = flat.reshape(x.shape)
    else:
        normed = normalised(x, model.norm, model.norm_eps, of.head_dim, (), routes)
    if name not in weights:
        return normed.astype(x.dtype)
    weight = weights[name][None] if of.qk_norm is QkNorm.HEAD else take_split(weights[name], 0, digits, split, routes.sizes)
    weighted = scaled(normed, weight[None], model.norm, x.dtype)
    if not of.qk_norm_bias:
        return weighted
    bias = weights[f"{name}_bias"]
    return weighted + (bias[None] if of.qk_norm is QkNorm.HEAD else take_split(bias, 0, digits, split, routes.sizes))[None]


def _contained(keys: jax.Array, values: jax.Array) -> jax.Array:
    """Keys and values [T, K, Q] as [T, 2, K, Q], such that values that are not finite reach only the queries that may see them.

    Rows of many requests meet the same keys and values. What a row may not see is masked in its scores by choice, so a key may be anything;
    but its weight of 0 times a value of NaN is NaN. So where a key or a value is no number the key becomes NaN and the value 0: one NaN is
    enough for the score, and so has the same effect on every query that sees it. Pages that are read or reused need no other check.
    """
    numbers = (jnp.abs(keys) <= _LARGEST) & (jnp.abs(values) <= _LARGEST)
    return jnp.stack([jnp.where(numbers, keys, jnp.nan), jnp.where(numbers, values, 0.0)], axis=1)


def _from_group(found: kernels.Attended, weights: Params, group: Group, routes: Routes) -> jax.Array:
    frame = routes.frame(group.order, routes.head_digits)
    sinks = take_split(weights["sinks"], 0, routes.head_digits, group.heads, routes.sizes) if "sinks" in weights else None
    out = weighted(found.out, found.mass, group.sequence, routes.sizes, sinks)  # [T.b, H.h, Q] {s unreduced}
    return move(out, frame, Split(group.batch, group.heads, group.sequence), Split(routes.tokens, routes.ffn))  # [T.t, H.f, Q]


def _scores(of: Attention) -> kernels.Scores:
    return kernels.Scores(of.scale, of.cap, of.window)


def _tiles(routes: Routes) -> kernels.Tiles | None:
    return None if routes.plain else routes.plan.slice.chip.platform.tiles


def _rows(array: jax.Array, group: Group, routes: Routes) -> jax.Array:
    """This shard's block of a host array whose first dimension runs over the group's tokens."""
    return take_split(jnp.asarray(array), 0, group.order, group.batch, routes.sizes)


def _lying(kv: Any, layer: Any, pages: jax.Array, group: Group, routes: Routes) -> cache.Stored | None:
    """Where pages lie whose heads this device reads, from the first of them on; None if these are no run."""
    choice = routes.kv_choice(group)
    if choice is None:
        return cache.stored(kv, layer, pages)
    table, count = choice
    if (table != table[:, :1] + np.arange(count)).any():
        return None
    axes = tuple(axis for axis in group.heads if routes.sizes[axis] > 1)
    return cache.stored(kv, layer, pages, jnp.asarray(table[:, 0])[lax.axis_index(axes)])


def _choose(pages: KeysValues, group: Group, routes: Routes) -> KeysValues:
    """The key-value heads that this device's query heads read, in their order: [.., K.k, S, Q] → [.., K', S, Q]."""
    choice = routes.kv_choice(group)
    if choice is None:
        return pages
    table, _ = choice
    axes = tuple(axis for axis in group.heads if routes.sizes[axis] > 1)
    heads, leading = jnp.asarray(table)[lax.axis_index(axes)], len(pages.keys.shape) - 3
    return jax.tree.map(lambda x: jnp.take(x, heads, axis=leading), pages)
