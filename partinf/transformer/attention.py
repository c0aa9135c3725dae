"""The attention sublayer: projections of all tokens at once, then the core of each token group under the roles of its phase.

Axes as in `Routes`: t splits tokens and e, f split weights in the linear layers; b, h, k are a group's batch, head and kv-head axes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from partinf.collectives import Split, move, take_split
from partinf.model_config import Position
from partinf.transformer import cache
from partinf.transformer.batch import Batch, DecodeBatch, PrefillBatch
from partinf.transformer.linear import dot, head_norm
from partinf.transformer.params import Params
from partinf.transformer.rope import rotate
from partinf.transformer.routes import Group, Routes

_MASKED = -1e30  # finite, so that a row without any key stays finite


def attention(weights: Params, x: jax.Array, kv: Any, layer: Any, batch: Batch, routes: Routes, freqs: np.ndarray) -> tuple[jax.Array, Any]:
    """Attention of normalised x [T.t, E.e] for all tokens of the step.

    Args:
        kv: the cache; this layer's pages receive the step's keys and values.

    Returns:
        [T.t, E.e] {f unreduced}, and the updated cache.
    """
    q = dot("te,hqe->thq", x, weights["wq"])  # [T.t, H.f, Q] {e unreduced}
    new = dot("te,ckqe->tckq", x, weights["wkv"])  # [T.t, 2, K.kf, Q] {e unreduced}
    lanes = routes.bucket.decode_rows // routes.ways(routes.tokens)
    outputs = []
    if routes.bucket.decode_rows:
        out, kv = _decode(weights, q[:lanes], new[:lanes], kv, layer, batch.decode, routes, freqs)
        outputs.append(out)
    if routes.bucket.prefill_tokens:
        out, kv = _prefill(weights, q[lanes:], new[lanes:], kv, layer, batch.prefill, routes, freqs)
        outputs.append(out)
    out = jnp.concatenate(outputs) if len(outputs) > 1 else outputs[0]  # [T.t, H.f, Q]
    return dot("thq,ehq->te", out, weights["wo"]), kv


def attend(q: jax.Array, kv: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax attention of q [B, L, H, Q] over kv [B, M, 2, K, Q] where visible [B, L, M]; query head i reads kv head i // (H / K).

    The plain form: scores in float32, everything materialised.
    """
    rows, length, heads, head_dim = q.shape
    groups = kv.shape[3]
    q = q.reshape(rows, length, groups, heads // groups, head_dim)
    scores = jnp.einsum("blkgq,bmkq->bkglm", q, kv[:, :, 0], preferred_element_type=jnp.float32) * head_dim**-0.5
    probs = jax.nn.softmax(jnp.where(visible[:, None, None], scores, _MASKED), axis=-1).astype(q.dtype)
    return dot("bkglm,bmkq->blkgq", probs, kv[:, :, 1]).reshape(rows, length, heads, head_dim)


def _decode(
    weights: Params, q: jax.Array, new: jax.Array, kv: Any, layer: Any, batch: DecodeBatch, routes: Routes, freqs: np.ndarray
) -> tuple[jax.Array, Any]:
    group, size = routes.decode, routes.plan.cache.page_size
    position, pages = _rows(batch.position, group, routes), _rows(batch.pages, group, routes)  # [B.b], [B.b, pages]
    q, new = _to_group(weights, q, new, position, group, routes, freqs)  # [B.b, H.h, Q], [B.b, 2, K.k, Q]
    pages, owned = cache.local_pages(pages, group.batch, routes.plan.cache.pages_per_shard)
    row = jnp.arange(position.shape[0])
    current = jnp.maximum(position, 0) // size
    kv = cache.write(kv, layer, pages[row, current], position % size, owned[row, current] & (position >= 0), new)
    context = _choose(cache.read(kv, layer, pages, q.dtype), group, routes)  # [B.b, M, 2, K.k, Q]
    visible = jnp.arange(context.shape[1])[None, :] <= position[:, None]
    out = attend(q[:, None], context, visible[:, None])[:, 0]  # [B.b, H.h, Q]
    return _from_group(out, group, routes), kv


def _prefill(
    weights: Params, q: jax.Array, new: jax.Array, kv: Any, layer: Any, batch: PrefillBatch, routes: Routes, freqs: np.ndarray
) -> tuple[jax.Array, Any]:
    group, plan = routes.prefill, routes.plan
    owner, position = _rows(batch.owner, group, routes), _rows(batch.position, group, routes)  # [T.b]
    q, new = _to_group(weights, q, new, position, group, routes, freqs)  # [T.b, H.h, Q], [T.b, 2, K.k, Q]

    # To the owners of the pages: batch axes that only prefill has are gathered, the others hold all that their requests need.
    shared, owners = routes.shared_batch, routes.decode
    frame = routes.frame(group.order, routes.kv_digits, 0, 2)
    for_cache = move(new, frame, Split(group.batch, group.kv), Split(shared, owners.kv))
    page = take_split(jnp.asarray(batch.page), 0, group.order, shared, routes.sizes)
    offset = take_split(jnp.asarray(batch.position), 0, group.order, shared, routes.sizes) % plan.cache.page_size
    local, owned = cache.local_pages(page, owners.batch, plan.cache.pages_per_shard)

    keys, key_owner, key_position = new, owner, position
    if routes.bucket.prefill_pages:
        context, slots, starts = _earlier(kv, layer, batch, routes, q.dtype)  # [S.b, M, 2, K.k, Q], [S.b], [S.b]
        count, length = context.shape[:2]
        keys = jnp.concatenate([context.reshape(count * length, *context.shape[2:]), new])
        inside = jnp.arange(length)[None, :] < starts[:, None]
        key_owner = jnp.concatenate([jnp.where(inside, slots[:, None], -2).reshape(-1), owner])
        key_position = jnp.concatenate([jnp.tile(jnp.arange(length), count), position])
    kv = cache.write(kv, layer, local, offset, owned, for_cache)
    visible = (owner[:, None] == key_owner[None, :]) & (key_position[None, :] <= position[:, None])
    out = attend(q[None], _choose(keys[None], group, routes), visible[None])[0]  # [T.b, H.h, Q]
    return _from_group(out, group, routes), kv


def _earlier(kv: Any, layer: Any, batch: PrefillBatch, routes: Routes, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What earlier steps stored of each slot's sequence, brought to where its tokens attend: [S.b, M, 2, K.k, Q], slot ids, lengths."""
    group, owners, shared = routes.prefill, routes.decode, routes.shared_batch
    only_owners = tuple(axis for axis in owners.batch if axis not in shared)
    order = group.batch
    pages = take_split(jnp.asarray(batch.pages), 0, order, shared, routes.sizes)
    local, owned = cache.local_pages(pages, owners.batch, routes.plan.cache.pages_per_shard)
    found = cache.read(kv, layer, local, dtype)  # [S.s, M, 2, K.k', Q], right on the owner alone
    owned = jnp.repeat(owned, routes.plan.cache.page_size, axis=1)
    found = jnp.where(owned[:, :, None, None, None], found, 0)
    frame = routes.frame(order, routes.kv_digits, 0, 3)
    context = move(found, frame, Split(shared, owners.kv, only_owners), Split(group.batch, group.kv))
    slots = take_split(jnp.arange(routes.bucket.prefill_slots), 0, order, group.batch, routes.sizes)
    return context, slots, take_split(jnp.asarray(batch.start), 0, order, group.batch, routes.sizes)


def _to_group(
    weights: Params, q: jax.Array, new: jax.Array, position: jax.Array, group: Group, routes: Routes, freqs: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Projected queries, keys and values as the group attends to them: moved, with bias, normalised and rotated as the model has it."""
    model = routes.plan.model
    q = move(q, routes.frame(group.order, routes.head_digits), routes.q_projected, Split(group.batch, group.heads))
    new = move(new, routes.frame(group.order, routes.kv_digits, 0, 2), routes.kv_projected, Split(group.batch, group.kv))
    if "bq" in weights:
        q = q + take_split(weights["bq"], 0, routes.head_digits, group.heads, routes.sizes)[None]
        new = new + take_split(weights["bkv"], 1, routes.kv_digits, group.kv, routes.sizes)[None]
    keys, values = new[:, 0], new[:, 1]
    if model.qk_norm:
        q, keys = head_norm(q, weights["q_norm"], model), head_norm(keys, weights["k_norm"], model)
    if model.position is Position.ROPE:
        q, keys = rotate(q, position, freqs), rotate(keys, position, freqs)
    return q, jnp.stack([keys, values], axis=1)


def _from_group(out: jax.Array, group: Group, routes: Routes) -> jax.Array:
    frame = routes.frame(group.order, routes.head_digits)
    return move(out, frame, Split(group.batch, group.heads), Split(routes.tokens, routes.ffn))  # [T.t, H.f, Q]


def _rows(array: jax.Array, group: Group, routes: Routes) -> jax.Array:
    """This shard's block of a host array whose first dimension runs over the group's tokens."""
    return take_split(jnp.asarray(array), 0, group.order, group.batch, routes.sizes)


def _choose(kv: jax.Array, group: Group, routes: Routes) -> jax.Array:
    """The key-value heads that this device's query heads read, in their order: kv [B, M, 2, K.k, Q] → [B, M, 2, K', Q]."""
    choice = routes.kv_choice(group)
    if choice is None:
        return kv
    table, _ = choice
    axes = tuple(axis for axis in group.heads if routes.sizes[axis] > 1)
    return jnp.take(kv, jnp.asarray(table)[lax.axis_index(axes)], axis=3)
