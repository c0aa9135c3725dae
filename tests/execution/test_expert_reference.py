"""The definition of a mixture of experts, against plain numpy in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.model.config import Activation, ModelConfig
from partinf.model.kinds import Experts, FeedForward, Router, Score
from partinf.transformer.params import declare
from partinf.transformer.reference import forward
from tests.core.test_experts import ROUTERS


def routed(logits: np.ndarray, layer: dict[str, np.ndarray], of: Experts) -> dict[int, float]:
    """The chosen experts of one token, and their weights."""
    router = of.router
    logits = logits + (layer["router_bias"] if router.bias else 0)
    exps = np.exp(logits - logits.max())
    scores = {Score.SOFTMAX: exps / exps.sum(), Score.SIGMOID: 1 / (1 + np.exp(-logits)), Score.SOFTMAX_OF_CHOSEN: logits}[router.score]
    ranked = scores + (layer["router_correction"] if router.correction else 0)
    if router.groups > 1:
        grouped = np.sort(ranked.reshape(router.groups, -1), axis=1)
        best = grouped[:, -1] if router.group_by_greatest else grouped[:, -2:].sum(axis=1)
        allowed = np.isin(np.arange(router.groups), np.argsort(-best)[: router.chosen_groups])
        ranked = np.where(np.repeat(allowed, of.count // router.groups), ranked, -np.inf)
    chosen = np.argsort(-ranked, kind="stable")[: of.per_token]
    weights = scores[chosen]
    if router.score is Score.SOFTMAX_OF_CHOSEN:
        weights = np.exp(weights - weights.max())
    if router.score is Score.SOFTMAX_OF_CHOSEN or router.renormalised:
        weights = weights / weights.sum()
    return dict(zip(chosen.tolist(), (weights * router.scale).tolist(), strict=True))


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_the_chosen_experts_are_added_up(router: Router) -> None:
    """One layer whose attention adds nothing, so that a token's logits follow from that token alone."""
    of = Experts(8, 2, FeedForward(8, True, Activation.SILU, ()), router, shared=4, shared_gate=True)
    model = ModelConfig("mixed", 1, 16, 0, 2, 2, 8, 256, experts=of)
    rng = np.random.default_rng(0)
    is_leaf = lambda x: hasattr(x, "letters")  # noqa: E731
    params: Any = jax.tree.map(lambda d: rng.standard_normal(d.shape) * 0.3, declare(model, unrolled=True), is_leaf=is_leaf)
    layer = params["layers"][0]
    layer["wo"] = np.zeros_like(layer["wo"])
    got = forward(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), model, jnp.asarray([[3, 1, 4]]))[0, -1]

    def norm(v: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return v / np.sqrt(np.mean(v * v) + model.norm_eps) * weight

    def through(w_in: np.ndarray, w_out: np.ndarray, h: np.ndarray) -> np.ndarray:
        gate, up = w_in @ h
        return w_out @ (gate / (1 + np.exp(-gate)) * up)

    x = params["embed"][4]
    h = norm(x, layer["ffn_norm"])
    x = x + through(layer["w_in"], layer["w_out"], h) / (1 + np.exp(-layer["shared_gate"] @ h))
    for number, weight in routed(layer["router"] @ h, layer, of).items():
        x = x + weight * through(layer["wx_in"][number], layer["wx_out"][number], h)
    wanted = params["unembed"][: model.vocab_size] @ norm(x, params["final_norm"])
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=2e-4, atol=2e-4)
