"""Which experts every token goes through, and with which weights.

Logits, choice and weights are computed in float32 by the same operations from the same rows on every device that holds these rows, so
that all route them bit-equally and nothing about a route is ever sent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from partinf.model.kinds import Experts, Score
from partinf.transformer.params import Params


def routed(weights: Params, hidden: jax.Array, of: Experts) -> tuple[jax.Array, jax.Array]:
    """The experts [T, k] of rows [T, E], best first, and their weights [T, k] in float32.

    Of equal scores the expert with the lowest number is chosen. Rows that are not finite get valid experts, all different, and
    weights that are not finite.
    """
    router = of.router
    logits = jnp.einsum("te,xe->tx", hidden, weights["router"], precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    if router.bias:
        logits = logits + weights["router_bias"].astype(jnp.float32)[None]
    scores = {
        Score.SOFTMAX: lambda: jax.nn.softmax(logits, axis=-1),
        Score.SIGMOID: lambda: jax.nn.sigmoid(logits),
        Score.SOFTMAX_OF_CHOSEN: lambda: logits,
    }[router.score]()
    ranked = scores + weights["router_correction"][None] if router.correction else scores
    if router.groups > 1:
        ranked = _in_best_groups(ranked, of)
    best, chosen = lax.top_k(ranked, of.per_token)
    picked = best if ranked is scores else jnp.take_along_axis(scores, chosen, axis=-1)
    if router.score is Score.SOFTMAX_OF_CHOSEN:
        picked = jax.nn.softmax(picked, axis=-1)
    elif router.renormalised:
        picked = picked / jnp.sum(picked, axis=-1, keepdims=True)
    return chosen, picked * router.scale if router.scale != 1.0 else picked


def _in_best_groups(ranked: jax.Array, of: Experts) -> jax.Array:
    """Scores [T, X] for the choice, -inf outside a token's best groups."""
    router = of.router
    grouped = ranked.reshape(ranked.shape[0], router.groups, -1)
    best = lax.top_k(grouped, 1 if router.group_by_greatest else 2)[0].sum(axis=-1)  # [T, groups]
    _, kept = lax.top_k(best, router.chosen_groups)
    allowed = jnp.any(kept[:, :, None] == jnp.arange(router.groups)[None, None], axis=1)  # [T, groups]
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(ranked.shape)
