"""The FFN sublayer, written once for every role assignment.

With e and f the axes that still split E and F after gathering, and t those that split tokens:

    1D weight-stationary   e = (),   f = xyz, t = ()      no collective but those around the sublayer
    2D weight-stationary   e = x,    f = yz,  t = ()      reduce-scatter and all-gather over x in the middle
    weight-gathered XY     e = (),   f = z,   t = xy      as 1D, over z alone
    weight-gathered XYZ    e = (),   f = (),  t = xyz     none

The scatter in the middle may split F or the tokens, since the nonlinearity works element by element; both move the same bytes. It splits
the tokens where every device gets whole tiles of them: the leading dimension is one whose reduce-scatter every compiler keeps, whatever
the model's widths are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from partinf.model.kinds import FeedForward
from partinf.partition.collectives import Split, move, take_split
from partinf.transformer.kernels import rows as row_kernels
from partinf.transformer.linear import activate, made_for, native_rows
from partinf.transformer.params import Params
from partinf.transformer.routes import Routes

_TILE_ROWS = 8  # of a TPU's tiles


def ffn(weights: Params, hidden: jax.Array, of: FeedForward, routes: Routes) -> jax.Array:
    """The FFN between its two products: [T.t, 2, F.f] {e unreduced} (1 without a gate) → [T.t, F.f]."""
    order, cols = routes.tokens + routes.embed, routes.hidden_digits
    tiles = hidden.shape[0] % (_TILE_ROWS * routes.ways(routes.embed)) == 0
    split = Split(order, routes.ffn) if tiles else Split(routes.tokens, routes.ffn + routes.embed)
    whole = Split(routes.tokens, routes.ffn, routes.embed)
    hidden = move(hidden, routes.frame(order, cols, 0, 2), whole, split)  # [T.te, 2, F.f] or [T.t, 2, F.fe]
    if "b_in" in weights:
        hidden = hidden + take_split(weights["b_in"], 1, cols, split.cols, routes.sizes)[None]
    live = None if routes.ways(routes.embed) > 1 else routes.live
    hidden = activated(hidden, of, routes, live)  # [T.te, F.f] or [T.t, F.fe]
    return move(hidden, routes.frame(order, cols), split, Split(routes.tokens, routes.ffn))  # [T.t, F.f]


def activated(hidden: jax.Array, of: FeedForward, routes: Routes, live: jax.Array | None = None) -> jax.Array:
    """The nonlinearity on hidden [T, 2, F] (gate, up) or [T, 1, F] → [T, F], in the type that the platform prefers.

    Args:
        live: [T], false for rows that are padding, where that is known; they may come out as zeros.
    """
    platform = made_for(routes)
    if native_rows(routes) and row_kernels.takes_gated(hidden, of):
        return row_kernels.gated(hidden, of, live)
    if platform is not None and platform.wide_activation:
        return activate(hidden.astype(jnp.float32), of).astype(hidden.dtype)
    return activate(hidden, of)
