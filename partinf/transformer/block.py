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

from partinf.model.config import Block
from partinf.partition.collective_matmul import Cut, gather_multiply, multiply_scatter
from partinf.partition.collectives import Split
from partinf.partition.quantize import Quantized
from partinf.transformer.attention import Rotations, attention
from partinf.transformer.batch import Batch
from partinf.transformer.ffn import ffn
from partinf.transformer.linear import LEAVING, dot, embed_vector, gather_weights, made_for, norm
from partinf.transformer.params import OneOf, Params
from partinf.transformer.routes import Routes

# Products of the gathered activations. Tokens come first in what comes out, so that a scatter over them needs no other order.
_ENTER = {"wq": "te,hqe->thq", "wkv": "te,ckqe->tckq", "w_in": "te,cfe->tcf"}


def block(weights: Params, x: jax.Array, kv: Any, layer: Any, batch: Batch, routes: Routes, rotations: Rotations) -> tuple[jax.Array, Any]:
    """One layer: x [T.t, E.w] → x and the updated cache.

    Serial: x + Attention(norm x), then + FFN(norm of that). Parallel: both of the same norm x, their partial sums added before they are
    reduced together.

    Args:
        weights: those before the cores gathered already (`gather_weights`); those after them are gathered here, where nothing that they
            wait for keeps them from running beside the first products.
    """
    weights = {**weights, **gather_weights(weights, LEAVING, routes)}
    if routes.plan.model.block is Block.PARALLEL:
        q, new, hidden = _enter(x, weights, "attention_norm", ("wq", "wkv", "w_in"), routes)
        attended, kv = attention(weights, q, new, kv, layer, batch, routes, rotations)
        return _leave(x, weights, {"wo": attended, "w_out": ffn(weights, hidden, routes)}, ("bo", "b_out"), routes), kv
    q, new = _enter(x, weights, "attention_norm", ("wq", "wkv"), routes)
    attended, kv = attention(weights, q, new, kv, layer, batch, routes, rotations)
    x = _leave(x, weights, {"wo": attended}, ("bo",), routes)
    (hidden,) = _enter(x, weights, "ffn_norm", ("w_in",), routes)
    return _leave(x, weights, {"w_out": ffn(weights, hidden, routes)}, ("b_out",), routes), kv


def _enter(x: jax.Array, weights: Params, name: str, wanted: tuple[str, ...], routes: Routes) -> tuple[jax.Array, ...]:
    """Norm, gather and products before a sublayer's core: [T.t, E.w] → [T.t, E.e] · W, each {e unreduced}."""
    normed = norm(x, weights, name, routes.weight, routes)

    def multiply(part: jax.Array, cut: Cut) -> tuple[jax.Array, ...]:
        return tuple(dot(_ENTER[name], part, _cut(weights[name], cut, -1), jnp.float32, made_for(routes)) for name in wanted)

    frame, source, target = routes.frame((), routes.weight_stored), Split(cols=routes.weight), Split(cols=routes.embed)
    products = gather_multiply(normed, frame, source, target, routes.phase.loop, multiply)
    return tuple(product.astype(x.dtype) for product in products)


def _leave(x: jax.Array, weights: Params, inner: Mapping[str, jax.Array], biases: tuple[str, ...], routes: Routes) -> jax.Array:
    """Products after a sublayer's core, inner [T.t, F.f] by the weight that each meets, reduced into the residual x [T.t, E.w]."""

    def multiply(cut: Cut, rows: slice) -> jax.Array:
        cuts = {name: _cut(weights[name], cut, 0) for name in inner}
        parts = [dot("tf,ef->te", hidden[rows], cuts[name], jnp.float32, made_for(routes)) for name, hidden in inner.items()]
        return sum(part.astype(x.dtype) for part in parts) if len(parts) > 1 else parts[0]

    partial = Split(cols=routes.embed, unreduced=routes.ffn)
    frame, target = routes.frame((), routes.weight_stored), Split(cols=routes.weight)
    x = x + multiply_scatter(multiply, frame, x.shape[0], partial, target, routes.phase.loop, x.dtype)
    for name in biases:
        if name in weights:
            x = x + embed_vector(weights[name], routes.weight, routes)
    return x


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
