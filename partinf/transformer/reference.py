"""The definition of the model: one device, no cache, no padding, no sharding. Everything that is partitioned must equal this.

Letters as in `partinf.axes`: B sequences of L tokens, E d_model, F d_ff, H query heads in groups of G per key-value head K, Q d_head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from partinf.model.config import ModelConfig, Position
from partinf.model.kinds import Activation, Block, Experts, FeedForward, LayerKind, Norm, NormPlaces, QkNorm, Score
from partinf.transformer.params import Params, Stacks
from partinf.transformer.rope import angles, growth, rotate


def forward(params: Params, model: ModelConfig, tokens: jax.Array, served: int = 0) -> jax.Array:
    """Logits [B, L, V] (float32, V unpadded) of tokens [B, L], every sequence starting at position 0.

    Args:
        served: the longest context that the deployment serves, by which some rotations are chosen; L by default.
    """
    served = served or tokens.shape[1]
    x = params["embed"][tokens]  # [B, L, E]
    x = x * jnp.asarray(model.embedding_scale, x.dtype)
    if model.position is Position.LEARNED:
        x = x + params["positions"][None, : tokens.shape[1]]
    for layer, number in zip(_layers(params, model), model.kind_of_layers, strict=True):
        x = _layer(layer, model.layer_kinds[number], x, served)
    if model.final_norm:
        x = _norm(x, params, "final_norm", model.norm, model.norm_eps)
    table = params.get("unembed", params["embed"])
    logits = jnp.einsum("ble,ve->blv", x, table, preferred_element_type=jnp.float32)
    if model.output_bias:
        logits = logits + params["unembed_bias"][None, None].astype(jnp.float32)
    logits = logits * model.logit_scale
    if model.logit_cap:
        logits = model.logit_cap * jnp.tanh(logits / model.logit_cap)
    return logits[..., : model.vocab_size]


def _layer(layer: Params, kind: LayerKind, x: jax.Array, served: int) -> jax.Array:
    def before(x: jax.Array, name: str) -> jax.Array:
        return _norm(x, layer, name, kind.norm, kind.norm_eps) if kind.norms.before else x

    def added(x: jax.Array, name: str) -> jax.Array:
        normed = kind.norms.after and kind.norms is not NormPlaces.SUM
        return (_norm(x, layer, name, kind.norm, kind.norm_eps) if normed else x) * kind.residual_scale

    def summed(x: jax.Array, name: str) -> jax.Array:
        return _norm(x, layer, name, kind.norm, kind.norm_eps) if kind.norms is NormPlaces.SUM else x

    if kind.block.parallel:
        first = before(x, "attention_norm")
        second = before(x, "ffn_norm") if kind.block is Block.PARALLEL_TWO_NORMS else first
        return x + (_attention(layer, kind, first, served) + feed_forward(layer, kind, second)) * kind.residual_scale
    x = summed(x + added(_attention(layer, kind, before(x, "attention_norm"), served), "attention_post_norm"), "attention_post_norm")
    return summed(x + added(feed_forward(layer, kind, before(x, "ffn_norm")), "ffn_post_norm"), "ffn_post_norm")


def greedy(params: Params, model: ModelConfig, prompt: list[int], count: int) -> list[int]:
    """The `count` most likely next tokens, one after the other, each from a forward pass over everything before it."""
    tokens = list(prompt)
    step = jax.jit(forward, static_argnums=1)
    padded = len(prompt) + count
    for _ in range(count):
        row = jnp.asarray([tokens + [0] * (padded - len(tokens))])  # later tokens do not reach earlier positions
        tokens.append(int(jnp.argmax(step(params, model, row)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def _attention(layer: Params, kind: LayerKind, x: jax.Array, served: int) -> jax.Array:
    of, positions = kind.attention, jnp.arange(x.shape[1])[None, :]  # [1, L]
    q = jnp.einsum("ble,hqe->blhq", x, layer["wq"])
    k = jnp.einsum("ble,kqe->blkq", x, layer["wkv"][0])
    v = jnp.einsum("ble,kqe->blkq", x, layer["wkv"][1])
    if "wq" in of.biases:
        q = q + layer["bq"][None, None]
    if "wkv" in of.biases:
        k, v = k + layer["bkv"][0][None, None], v + layer["bkv"][1][None, None]
    if of.qkv_clip:
        q, k, v = (jnp.clip(one, -of.qkv_clip, of.qkv_clip) for one in (q, k, v))
    if not of.qk_norm_rotated:
        q, k = _heads_norm(q, layer, "q_norm", kind), _heads_norm(k, layer, "k_norm", kind)
    if of.rotation is not None:
        by = angles(positions, of.rotation, of.head_dim, served)
        q, k = rotate(q, by), rotate(k, by)
    if of.qk_norm_rotated:
        q, k = _heads_norm(q, layer, "q_norm", kind), _heads_norm(k, layer, "k_norm", kind)
    if of.rotation is not None and of.rotation.query_growth:
        q = q * growth(positions, of.rotation).astype(q.dtype)
    q = q.reshape(*q.shape[:2], of.num_kv_heads, of.num_heads // of.num_kv_heads, of.head_dim)  # [B, L, K, G, Q]
    scores = jnp.einsum("blkgq,bmkq->bkglm", q, k, preferred_element_type=jnp.float32) * of.scale
    if of.cap:
        scores = of.cap * jnp.tanh(scores / of.cap)
    distance = positions[:, :, None] - positions[:, None, :]  # [1, L, M]
    seen = (distance >= 0) & (distance < (of.window or x.shape[1]))
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    if of.sinks:
        sinks = layer["sinks"].astype(jnp.float32).reshape(1, of.num_kv_heads, -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : x.shape[1]].astype(x.dtype)
    out = jnp.einsum("bkglm,bmkq->blkgq", weights, v).reshape(*x.shape[:2], of.num_heads * of.head_dim)
    out = jnp.einsum("blf,ef->ble", out, layer["wo"])
    return out + layer["bo"][None, None] if "wo" in of.biases else out


def _heads_norm(x: jax.Array, layer: Params, name: str, kind: LayerKind) -> jax.Array:
    """Queries or keys [B, L, heads, Q], normalised head by head or all of a token together."""
    how = kind.attention.qk_norm
    if how is QkNorm.NONE:
        return x
    wide = x.reshape(*x.shape[:2], -1) if how is QkNorm.WIDTH else x
    normed = _normalised(wide, kind.norm, kind.norm_eps).reshape(x.shape)
    weighted = _weighted(normed, layer.get(name), kind.norm, x.dtype)
    if not kind.attention.qk_norm_bias:
        return weighted
    bias = layer[f"{name}_bias"]
    return weighted + bias.reshape((1,) * (weighted.ndim - bias.ndim) + bias.shape)


def feed_forward(layer: Params, kind: LayerKind, x: jax.Array) -> jax.Array:
    """A feed-forward, or experts with or without one next to them, which a gate may weight."""
    out = jnp.zeros_like(x)
    if kind.feed_forward is not None:
        out = _ffn(layer, kind.feed_forward, x)
        if "shared_gate" in layer:
            gate = jnp.einsum("ble,e->bl", x, layer["shared_gate"], preferred_element_type=jnp.float32)
            out = out * jax.nn.sigmoid(gate)[..., None].astype(x.dtype)
    return out if kind.experts is None else out + _experts(layer, kind.experts, x)


def _experts(layer: Params, of: Experts, x: jax.Array) -> jax.Array:
    """Every expert's output for every token, the weights of those that were not chosen being zero."""
    weights = _routed(layer, of, x)  # [B, L, X]
    out = jnp.zeros(x.shape, jnp.float32)
    for number in range(of.count):
        hidden = jnp.einsum("ble,cfe->cblf", x, layer["wx_in"][number])
        if "w_in" in of.each.biases:
            hidden = hidden + layer["bx_in"][number][:, None, None]
        one = jnp.einsum("blf,ef->ble", _activated(hidden, of.each), layer["wx_out"][number])
        if "w_out" in of.each.biases:
            one = one + layer["bx_out"][number][None, None]
        chosen = weights[..., number, None]
        out = out + jnp.where(chosen != 0, one.astype(jnp.float32) * chosen, 0.0)
    return out.astype(x.dtype)


def _routed(layer: Params, of: Experts, x: jax.Array) -> jax.Array:
    """The weight of every expert for every token, float32 [B, L, X], zero for those that are not chosen."""
    router = of.router
    logits = jnp.einsum("ble,xe->blx", x.astype(jnp.float32), layer["router"].astype(jnp.float32))
    if router.bias:
        logits = logits + layer["router_bias"].astype(jnp.float32)[None, None]
    scores = {
        Score.SOFTMAX: lambda: jax.nn.softmax(logits, axis=-1),
        Score.SIGMOID: lambda: jax.nn.sigmoid(logits),
        Score.SOFTMAX_OF_CHOSEN: lambda: logits,
    }[router.score]()
    ranked = scores + layer["router_correction"][None, None] if router.correction else scores
    if router.groups > 1:
        grouped = ranked.reshape(*ranked.shape[:2], router.groups, -1)
        best = jax.lax.top_k(grouped, 1 if router.group_by_greatest else 2)[0].sum(axis=-1)  # [B, L, groups]
        _, kept = jax.lax.top_k(best, router.chosen_groups)
        allowed = jnp.any(jax.nn.one_hot(kept, router.groups, dtype=bool), axis=-2)  # [B, L, groups]
        ranked = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(ranked.shape)
    _, chosen = jax.lax.top_k(ranked, of.per_token)  # of equal ones those with the lowest numbers
    picked = jnp.take_along_axis(scores, chosen, axis=-1)
    if router.score is Score.SOFTMAX_OF_CHOSEN:
        picked = jax.nn.softmax(picked, axis=-1)
    elif router.renormalised:
        picked = picked / jnp.sum(picked, axis=-1, keepdims=True)
    places = jax.nn.one_hot(chosen, of.count, dtype=bool)  # [B, L, k, X]
    return jnp.sum(jnp.where(places, (picked * router.scale)[..., None], 0.0), axis=-2)


def _ffn(layer: Params, of: FeedForward, x: jax.Array) -> jax.Array:
    hidden = jnp.einsum("ble,cfe->cblf", x, layer["w_in"])  # gate and up, or one matrix
    if "w_in" in of.biases:
        hidden = hidden + layer["b_in"][:, None, None]
    out = jnp.einsum("blf,ef->ble", _activated(hidden, of), layer["w_out"])
    return out + layer["b_out"][None, None] if "w_out" in of.biases else out


def _activated(hidden: jax.Array, of: FeedForward) -> jax.Array:
    """[2 or 1, B, L, F] → [B, L, F]."""
    activation = {
        Activation.SILU: jax.nn.silu,
        Activation.GELU: lambda y: jax.nn.gelu(y, approximate=False),
        Activation.GELU_TANH: jax.nn.gelu,
        Activation.GELU_SIGMOID: lambda y: y * jax.nn.sigmoid(1.702 * y),
        Activation.RELU: jax.nn.relu,
        Activation.RELU2: lambda y: jax.nn.relu(y) ** 2,
    }[of.activation]
    gate, up = hidden[0], hidden[-1]
    if of.clamp:
        gate, up = jnp.minimum(gate, of.clamp), jnp.clip(up, -of.clamp, of.clamp)
    return activation(gate) * (up + of.up_offset) if of.gated else activation(gate)


def _norm(x: jax.Array, weights: Params, name: str, norm: Norm, eps: float) -> jax.Array:
    normed = _weighted(_normalised(x, norm, eps), weights.get(name), norm, x.dtype)
    return normed + weights[f"{name}_bias"][None, None] if norm.biased else normed


def _normalised(x: jax.Array, norm: Norm, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    if norm.centred:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


def _weighted(normed: jax.Array, weight: jax.Array | None, norm: Norm, dtype: jnp.dtype) -> jax.Array:
    """Times the weight, or 1 + weight in float32."""
    if weight is None:
        return normed.astype(dtype)
    whole = (1,) * (normed.ndim - weight.ndim) + weight.shape
    if norm.offset:
        return (normed * (norm.offset + weight.astype(jnp.float32).reshape(whole))).astype(dtype)
    return normed.astype(dtype) * weight.reshape(whole)


def _layers(params: Params, model: ModelConfig) -> list[Params]:
    layers = params["layers"]
    if isinstance(layers, tuple):
        return list(layers)
    stacks = Stacks(layers, model)

    def layer(index: int, kind: int) -> Params:
        stack, place = stacks.layer(index, kind)
        return jax.tree.map(lambda leaf: leaf[place], stack)

    return [layer(index, kind) for index, kind in enumerate(model.kind_of_layers)]
