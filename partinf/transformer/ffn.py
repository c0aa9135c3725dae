"""The FFN sublayer, written once for every role assignment.

With e and f the axes that still split E and F after gathering, and t those that split tokens:

    1D weight-stationary   e = (),   f = xyz, t = ()      no collective but those around the sublayer
    2D weight-stationary   e = x,    f = yz,  t = ()      reduce-scatter and all-gather over x in the middle
    weight-gathered XY     e = (),   f = z,   t = xy      as 1D, over z alone
    weight-gathered XYZ    e = (),   f = (),  t = xyz     none
"""

from __future__ import annotations

import jax

from partinf.collectives import Split, move, take_split
from partinf.transformer.linear import activate
from partinf.transformer.params import Params
from partinf.transformer.routes import Routes


def ffn(weights: Params, hidden: jax.Array, routes: Routes) -> jax.Array:
    """The FFN between its two products: [2, T.t, F.f] {e unreduced} (1 without a gate) → [T.t, F.f]."""
    frame = routes.frame((), routes.hidden_digits, 1, 2)
    whole, split = Split(cols=routes.ffn), Split(cols=routes.ffn + routes.embed)
    hidden = move(hidden, frame, Split(cols=routes.ffn, unreduced=routes.embed), split)  # [2, T.t, F.fe]
    if "b_in" in weights:
        bias = take_split(weights["b_in"], 1, routes.hidden_digits, split.cols, routes.sizes)
        hidden = hidden + bias[:, None, :]
    hidden = activate(hidden, routes.plan.model)  # [T.t, F.fe]
    return move(hidden, routes.frame((), routes.hidden_digits), split, whole)  # [T.t, F.f]
