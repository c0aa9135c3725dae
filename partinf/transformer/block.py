"""One layer inside `shard_map`: norm, gather E, products, a core, products, reduce-scatter E; twice, or once for a parallel block.

The products that read the gathered activations, and those whose sums are scattered, are made here together with the adjacent collective
them, so that both may run as one loop (`partinf.partition.collective_matmul`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from partinf.model.kinds import Block, LayerKind, NormPlaces
from partinf.model.weights import bias_of
from partinf.partition.collective_matmul import Cut, gather_multiply, multiply_scatter
from partinf.partition.collectives import Split, move, take_split
from partinf.partition.quantize import Quantized
from partinf.transformer.attention import Rotations, attention
from partinf.transformer.batch import Batch
from partinf.transformer.experts import Partial, experts, gather_experts, gathered_rows, joins, reduced, shares_gather
from partinf.transformer.ffn import ffn
from partinf.transformer.linear import LEAVING, dot, embed_vector, gather_weights, made_for, norm, normalised, row_by_row, weighted
from partinf.transformer.params import OneOf, Params
from partinf.transformer.routes import Routes

# Products of the gathered activations. Tokens come first in what comes out, so that a scatter over them needs no other order.
_ENTER = {"wq": "te,hqe->thq", "wkv": "te,ckqe->tckq", "w_in": "te,cfe->tcf"}
_SHARED = {"wq": "attention_norm", "wkv": "attention_norm"}
_NORMS = {Block.PARALLEL: {**_SHARED, "w_in": "attention_norm"}, Block.PARALLEL_TWO_NORMS: {**_SHARED, "w_in": "ffn_norm"}}


def block(
    weights: Params, x: jax.Array, kv: Any, layer: Any, batch: Batch, routes: Routes, number: int, rotations: Rotations
) -> tuple[jax.Array, Any]:
    """One layer: x [T.t, E.w] → x and the updated cache; E.e where the phase keeps x whole (`Phase.whole`).

    Serial: x + Attention(norm x), then + FFN(norm of that); norms may stand after a sublayer instead, or both. Parallel: both of the same
    norm x, their partial sums added before they are reduced together.

    Args:
        weights: those before the cores gathered already (`gather_weights`); those after them are gathered here, where nothing that they
            wait for keeps them from overlapping the first products.
        kv: the group of the cache in which the layer lies. layer: which of its layers that is.
        number: of the layer's kind. rotations: its own.
    """
    kind, group = routes.kinds[number], routes.groups[number]
    weights = {**weights, **gather_weights(weights, LEAVING, routes), **gather_experts(weights, routes)}
    if kind.block.parallel:
        wanted = {name: norm for name, norm in _NORMS[kind.block].items() if kind.feed_forward is not None or name != "w_in"}
        normed = _before(x, weights, tuple(dict.fromkeys(_NORMS[kind.block].values())), kind, routes)
        (q, new, *rest), mixed = _enter(normed, weights, wanted, _NORMS[kind.block]["w_in"], kind, routes)
        attended, kv = attention(weights, q, new, kv, layer, batch, routes, kind.attention, group, rotations)
        return _leave(x, weights, {"wo": attended, **_inner(weights, normed, rest, kind, routes)}, mixed, "", kind, routes), kv
    normed = _before(x, weights, ("attention_norm",), kind, routes)
    (q, new), _ = _enter(normed, weights, _SHARED, "", kind, routes)
    attended, kv = attention(weights, q, new, kv, layer, batch, routes, kind.attention, group, rotations)
    x = _leave(x, weights, {"wo": attended}, None, "attention_post_norm", kind, routes)
    return feed_forward(weights, x, kind, routes), kv


def feed_forward(weights: Params, x: jax.Array, kind: LayerKind, routes: Routes) -> jax.Array:
    """The second sublayer of a serial block: x [T.t, E.w] plus what its feed-forward, its experts or both make of the norm of x.

    Args:
        weights: gathered already.
    """
    normed = _before(x, weights, ("ffn_norm",), kind, routes)
    entering = {} if kind.feed_forward is None else {"w_in": "ffn_norm"}
    entered, mixed = _enter(normed, weights, entering, "ffn_norm", kind, routes)
    return _leave(x, weights, _inner(weights, normed, entered, kind, routes), mixed, "ffn_post_norm", kind, routes)


def _before(x: jax.Array, weights: Params, norms: tuple[str, ...], kind: LayerKind, routes: Routes) -> jax.Array:
    """The norm before a sublayer: [T.t, E.w]. Two norms of the same differ in what comes after their sums, so these alone are taken."""
    if not kind.norms.before:
        return x
    if len(norms) > 1:
        return normalised(x, kind.norm, kind.norm_eps, routes.plan.model.embed_dim, routes.between, routes).astype(x.dtype)
    return norm(x, weights, norms[0], routes.between, routes)


def _enter(
    normed: jax.Array, weights: Params, wanted: Mapping[str, str], mixed_by: str, kind: LayerKind, routes: Routes
) -> tuple[list[jax.Array], Partial | None]:
    """What a sublayer makes of its normalised input [T.t, E.w] before its core: it is gathered, once if all want it alike, and multiplied
    with matrices to [T.t, E.e] · W, each {e unreduced}, and goes through the experts.

    Args:
        wanted: matrix → the norm of what it multiplies. mixed_by: the norm of what the experts read; empty where the sublayer has none.
    """
    norms, own = tuple(dict.fromkeys(wanted.values())), kind.block is Block.PARALLEL_TWO_NORMS
    mixed, cols, dtype = None, routes.between, normed.dtype
    out = dtype if routes.phase.loop is None else jnp.float32  # parts that go around a ring are added in float32
    if mixed_by and kind.experts is not None:
        rows = gathered_rows(_scaled_by(mixed_by, normed, weights, kind, routes), routes)
        mixed = experts(weights, rows, kind.experts, routes)
        if not own and shares_gather(routes):
            normed, cols = rows, routes.embed

    def multiply(part: jax.Array, cut: Cut, rows: slice) -> tuple[jax.Array, ...]:
        read = {name: weighted(part, dtype, _part_of_norm(weights, name, cut, routes), name, (), routes) if own else part for name in norms}
        made = made_for(routes), _live(routes, rows)
        return tuple(dot(_ENTER[name], read[by], _cut(weights[name], cut, -1), out, *made) for name, by in wanted.items())

    if not wanted:
        return [], mixed
    frame, source, target = routes.frame((), routes.weight_stored), Split(cols=cols), Split(cols=routes.embed)
    products = gather_multiply(normed, frame, source, target, routes.phase.loop, multiply)
    return [product.astype(dtype) for product in products], mixed


def _scaled_by(name: str, normed: jax.Array, weights: Params, kind: LayerKind, routes: Routes) -> jax.Array:
    """What `_before` gives, [T.t, E.w], with the weight of its norm where it has none yet."""
    if kind.block is not Block.PARALLEL_TWO_NORMS:
        return normed
    return weighted(normed, normed.dtype, weights, name, routes.between, routes)


def _inner(weights: Params, normed: jax.Array, entered: list[jax.Array], kind: LayerKind, routes: Routes) -> Params:
    """What the feed-forward has between its two products, [T.t, F.f] by the weight that it meets next; nothing where there is none.

    Next to experts a gate may weight its output: the sigmoid of a product of the token, whose E lies split here.
    """
    if kind.feed_forward is None:
        return {}
    (hidden,) = entered
    inner = ffn(weights, hidden, kind.feed_forward, routes)
    if "shared_gate" in weights:
        wide = _scaled_by("ffn_norm", normed, weights, kind, routes).astype(jnp.float32)
        wide = wide * embed_vector(weights["shared_gate"], routes.between, routes).astype(jnp.float32)
        frame = routes.frame((), routes.weight_stored)
        gate = move(jnp.sum(wide, axis=-1, keepdims=True), frame, Split(unreduced=routes.between), Split())  # [T.t, 1]
        inner = (inner.astype(jnp.float32) * jax.nn.sigmoid(gate)).astype(inner.dtype)
    return {"w_out": inner}


def _leave(
    x: jax.Array, weights: Params, inner: Mapping[str, jax.Array], mixed: Partial | None, after: str, kind: LayerKind, routes: Routes
) -> jax.Array:
    """Products after a sublayer's core, inner [T.t, F.f] by the weight that each meets, reduced and added to the residual x [T.t, E.w].

    Args:
        mixed: what experts add, which is reduced with the products where it is split alike. after: the norm of what is added, or of
            the sum, where the kind has such.
    """
    partial = Split(routes.tokens, routes.embed, routes.ffn)
    together = mixed is not None and bool(inner) and routes.phase.loop is None and joins(mixed, partial, routes)
    out = x.dtype if routes.phase.loop is None else jnp.float32  # parts that go around a ring are added in float32

    def multiply(cut: Cut, rows: slice) -> jax.Array:
        cuts = {name: _cut(weights[name], cut, 0) for name in inner}
        made = made_for(routes), _live(routes, rows)
        parts = [dot("tf,ef->te", hidden[rows], cuts[name], out, *made) for name, hidden in inner.items()]
        if together:
            parts.append(mixed.array)
        return sum(part.astype(x.dtype) for part in parts) if len(parts) > 1 else parts[0]

    added = reduced(mixed, routes) if mixed is not None and not together else None
    if inner:
        frame, target = routes.frame((), routes.weight_stored), Split(cols=routes.between)
        source = Split(cols=routes.embed, unreduced=routes.ffn)
        dense = multiply_scatter(multiply, frame, x.shape[0], source, target, routes.phase.loop, x.dtype)
        added = dense if added is None else added + dense
    for name in inner:
        if bias_of(name) in weights:
            added = added + embed_vector(weights[bias_of(name)], routes.between, routes)
    if kind.norms.after and kind.norms is not NormPlaces.SUM:
        added = norm(added, weights, after, routes.between, routes)
    x = row_by_row(x + (added if kind.residual_scale == 1.0 else added * kind.residual_scale), routes)
    return norm(x, weights, after, routes.between, routes) if kind.norms is NormPlaces.SUM else x


def _live(routes: Routes, rows: slice) -> jax.Array | None:
    """Which of these rows of the step are no padding, where that is known."""
    return None if routes.live is None else routes.live[rows]


def _part_of_norm(weights: Params, name: str, cut: Cut, routes: Routes) -> Params:
    """The weight and the bias of a norm for a part of the gathered E."""
    own = (one for one in (name, f"{name}_bias") if one in weights)
    return {one: cut(take_split(weights[one], 0, routes.weight_stored, routes.embed, routes.sizes), 0, None) for one in own}


def _cut(weights: jax.Array | Quantized | OneOf, cut: Cut, dim: int) -> jax.Array | Quantized:
    """A part of a weight's dimension E, with its scales where E is not contracted."""
    layer = None
    if isinstance(weights, OneOf):
        weights, layer = weights.layers, weights.index
    lead = 0 if layer is None else 1
    if not isinstance(weights, Quantized):
        return cut(weights, dim % (weights.ndim - lead), layer)
    values = cut(weights.values, dim % (len(weights.shape) - lead), layer)
    if dim in weights.contracted:
        scale = weights.scale if layer is None else lax.dynamic_index_in_dim(weights.scale, layer, keepdims=False)
    else:
        scale = cut(weights.scale, dim, layer)
    return Quantized(values, scale, weights.contracted)
