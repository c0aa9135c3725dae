"""One layer inside `shard_map`: norm, gather E, products, a core, products, reduce-scatter E; twice, or once for a parallel block.

The products that read the gathered activations, and those whose sums are scattered, are made here together with the collective beside
them, so that both may run as one loop (`partinf.partition.collective_matmul`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from partinf.model.kinds import Block, LayerKind
from partinf.model.weights import bias_of
from partinf.partition.collective_matmul import Cut, gather_multiply, multiply_scatter
from partinf.partition.collectives import Split, take_split
from partinf.partition.quantize import Quantized
from partinf.transformer.attention import Rotations, attention
from partinf.transformer.batch import Batch
from partinf.transformer.ffn import ffn
from partinf.transformer.linear import LEAVING, dot, embed_vector, gather_weights, made_for, norm, normalised, weighted
from partinf.transformer.params import OneOf, Params
from partinf.transformer.routes import Routes

# Products of the gathered activations. Tokens come first in what comes out, so that a scatter over them needs no other order.
_ENTER = {"wq": "te,hqe->thq", "wkv": "te,ckqe->tckq", "w_in": "te,cfe->tcf"}
_SHARED = {"wq": "attention_norm", "wkv": "attention_norm"}
_NORMS = {Block.PARALLEL: {**_SHARED, "w_in": "attention_norm"}, Block.PARALLEL_TWO_NORMS: {**_SHARED, "w_in": "ffn_norm"}}


def block(
    weights: Params, x: jax.Array, kv: Any, layer: Any, batch: Batch, routes: Routes, kind: LayerKind, rotations: Rotations
) -> tuple[jax.Array, Any]:
    """One layer: x [T.t, E.w] → x and the updated cache; E.e where the phase keeps x whole (`Phase.whole`).

    Serial: x + Attention(norm x), then + FFN(norm of that); norms may stand after a sublayer instead, or both. Parallel: both of the same
    norm x, their partial sums added before they are reduced together.

    Args:
        weights: those before the cores gathered already (`gather_weights`); those after them are gathered here, where nothing that they
            wait for keeps them from running beside the first products.
        kind: of the layer. rotations: its own.
    """
    weights = {**weights, **gather_weights(weights, LEAVING, routes)}
    if kind.block.parallel:
        q, new, hidden = _enter(x, weights, _NORMS[kind.block], kind, routes)
        attended, kv = attention(weights, q, new, kv, layer, batch, routes, kind.attention, rotations)
        inner = {"wo": attended, "w_out": ffn(weights, hidden, kind.feed_forward, routes)}
        return _leave(x, weights, inner, "", kind, routes), kv
    q, new = _enter(x, weights, _SHARED, kind, routes)
    attended, kv = attention(weights, q, new, kv, layer, batch, routes, kind.attention, rotations)
    x = _leave(x, weights, {"wo": attended}, "attention_post_norm", kind, routes)
    (hidden,) = _enter(x, weights, {"w_in": "ffn_norm"}, kind, routes)
    return _leave(x, weights, {"w_out": ffn(weights, hidden, kind.feed_forward, routes)}, "ffn_post_norm", kind, routes), kv


def _enter(x: jax.Array, weights: Params, wanted: Mapping[str, str], kind: LayerKind, routes: Routes) -> tuple[jax.Array, ...]:
    """Norm, gather and products before a sublayer's core: [T.t, E.w] → [T.t, E.e] · W, each {e unreduced}.

    Args:
        wanted: matrix → the norm of what it multiplies. Two norms differ in what comes after their sums, so these are taken, and E is
            gathered, once.
    """
    norms = tuple(dict.fromkeys(wanted.values()))
    own = len(norms) > 1
    if not kind.norms.before:
        normed = x
    elif own:
        normed = normalised(x, kind.norm, kind.norm_eps, routes.plan.model.embed_dim, routes.between, routes).astype(x.dtype)
    else:
        normed = norm(x, weights, norms[0], routes.between, routes)

    def multiply(part: jax.Array, cut: Cut) -> tuple[jax.Array, ...]:
        read = {
            name: weighted(part, x.dtype, _part_of_norm(weights, name, cut, routes), name, (), routes) if own else part for name in norms
        }
        products = (dot(_ENTER[name], read[by], _cut(weights[name], cut, -1), jnp.float32, made_for(routes)) for name, by in wanted.items())
        return tuple(products)

    frame, source, target = routes.frame((), routes.weight_stored), Split(cols=routes.between), Split(cols=routes.embed)
    products = gather_multiply(normed, frame, source, target, routes.phase.loop, multiply)
    return tuple(product.astype(x.dtype) for product in products)


def _leave(x: jax.Array, weights: Params, inner: Mapping[str, jax.Array], after: str, kind: LayerKind, routes: Routes) -> jax.Array:
    """Products after a sublayer's core, inner [T.t, F.f] by the weight that each meets, reduced and added to the residual x [T.t, E.w].

    Args:
        after: the norm of what is added, where the kind has such.
    """

    def multiply(cut: Cut, rows: slice) -> jax.Array:
        cuts = {name: _cut(weights[name], cut, 0) for name in inner}
        parts = [dot("tf,ef->te", hidden[rows], cuts[name], jnp.float32, made_for(routes)) for name, hidden in inner.items()]
        return sum(part.astype(x.dtype) for part in parts) if len(parts) > 1 else parts[0]

    partial = Split(cols=routes.embed, unreduced=routes.ffn)
    frame, target = routes.frame((), routes.weight_stored), Split(cols=routes.between)
    added = multiply_scatter(multiply, frame, x.shape[0], partial, target, routes.phase.loop, x.dtype)
    for name in inner:
        if bias_of(name) in weights:
            added = added + embed_vector(weights[bias_of(name)], routes.between, routes)
    if kind.norms.after:
        added = norm(added, weights, after, routes.between, routes)
    return x + (added if kind.residual_scale == 1.0 else added * kind.residual_scale)


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
