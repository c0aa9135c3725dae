"""One layer inside `shard_map`: norm, gather E, sublayer, reduce-scatter E, twice."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from partinf.collectives import Split, move
from partinf.transformer.attention import attention
from partinf.transformer.batch import Batch
from partinf.transformer.ffn import ffn
from partinf.transformer.linear import gather_weights, norm
from partinf.transformer.params import Params
from partinf.transformer.routes import Routes


def block(weights: Params, x: jax.Array, kv: Any, layer: Any, batch: Batch, routes: Routes, freqs: np.ndarray) -> tuple[jax.Array, Any]:
    """A serial layer: x [T.t, E.w] → x + Attention(norm x), then + FFN(norm of that); returns it and the updated cache."""
    weights = gather_weights(weights, routes)
    frame = routes.frame((), routes.weight_stored)
    spread, joined = Split(cols=routes.weight), Split(cols=routes.embed)
    partial = Split(cols=routes.embed, unreduced=routes.ffn)

    h = move(norm(x, weights["attention_norm"], routes.weight, routes), frame, spread, joined)  # [T.t, E.e]
    h, kv = attention(weights, h, kv, layer, batch, routes, freqs)  # [T.t, E.e] {f unreduced}
    x = x + move(h, frame, partial, spread)  # [T.t, E.w]

    h = move(norm(x, weights["ffn_norm"], routes.weight, routes), frame, spread, joined)  # [T.t, E.e]
    h = ffn(weights, h, routes)  # [T.t, E.e] {f unreduced}
    return x + move(h, frame, partial, spread), kv  # [T.t, E.w]
