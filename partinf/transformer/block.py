"""One layer inside `shard_map`: norm, gather E, sublayers, reduce-scatter E; twice, or once for a parallel block."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from partinf.collectives import Split, move
from partinf.model_config import Block
from partinf.transformer.attention import attention
from partinf.transformer.batch import Batch
from partinf.transformer.ffn import ffn
from partinf.transformer.linear import embed_vector, gather_weights, norm
from partinf.transformer.params import Params
from partinf.transformer.routes import Routes


def block(weights: Params, x: jax.Array, kv: Any, layer: Any, batch: Batch, routes: Routes, freqs: np.ndarray) -> tuple[jax.Array, Any]:
    """One layer: x [T.t, E.w] → x and the updated cache.

    Serial: x + Attention(norm x), then + FFN(norm of that). Parallel: both of the same norm x, their partial sums added before they are
    reduced together.
    """
    weights = gather_weights(weights, routes)
    h = _enter(x, weights, "attention_norm", routes)
    attended, kv = attention(weights, h, kv, layer, batch, routes, freqs)  # [T.t, E.e] {f unreduced}
    if routes.plan.model.block is Block.PARALLEL:
        return _leave(x, attended + ffn(weights, h, routes), weights, ("bo", "b_out"), routes), kv
    x = _leave(x, attended, weights, ("bo",), routes)
    h = _enter(x, weights, "ffn_norm", routes)
    return _leave(x, ffn(weights, h, routes), weights, ("b_out",), routes), kv


def _enter(x: jax.Array, weights: Params, name: str, routes: Routes) -> jax.Array:
    """Norm and gather before a sublayer: [T.t, E.w] → [T.t, E.e]."""
    normed = norm(x, weights, name, routes.weight, routes)
    return move(normed, routes.frame((), routes.weight_stored), Split(cols=routes.weight), Split(cols=routes.embed))


def _leave(x: jax.Array, out: jax.Array, weights: Params, biases: tuple[str, ...], routes: Routes) -> jax.Array:
    """Reduce a sublayer's output [T.t, E.e] {f unreduced} into the residual x [T.t, E.w]."""
    partial = Split(cols=routes.embed, unreduced=routes.ffn)
    x = x + move(out, routes.frame((), routes.weight_stored), partial, Split(cols=routes.weight))
    for name in biases:
        if name in weights:
            x = x + embed_vector(weights[name], routes.weight, routes)
    return x
