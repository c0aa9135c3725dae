"""The definition of the model: one device, no cache, no padding, no sharding. Everything that is partitioned must equal this.

Letters as in `partinf.axes`: B sequences of L tokens, E d_model, F d_ff, H query heads in groups of G per key-value head K, Q d_head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from partinf.model.config import ModelConfig, Position
from partinf.model.kinds import Activation, Block, FeedForward, LayerKind, Norm, QkNorm
from partinf.transformer.params import Params
from partinf.transformer.rope import angles, rotate


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
        return (_norm(x, layer, name, kind.norm, kind.norm_eps) if kind.norms.after else x) * kind.residual_scale

    if kind.block.parallel:
        first = before(x, "attention_norm")
        second = before(x, "ffn_norm") if kind.block is Block.PARALLEL_TWO_NORMS else first
        return x + (_attention(layer, kind, first, served) + _ffn(layer, kind.feed_forward, second)) * kind.residual_scale
    x = x + added(_attention(layer, kind, before(x, "attention_norm"), served), "attention_post_norm")
    return x + added(_ffn(layer, kind.feed_forward, before(x, "ffn_norm")), "ffn_post_norm")


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
    return _weighted(normed, layer.get(name), kind.norm, x.dtype)


def _ffn(layer: Params, of: FeedForward, x: jax.Array) -> jax.Array:
    hidden = jnp.einsum("ble,cfe->cblf", x, layer["w_in"])  # gate and up, or one matrix
    if "w_in" in of.biases:
        hidden = hidden + layer["b_in"][:, None, None]
    activation = {
        Activation.SILU: jax.nn.silu,
        Activation.GELU: lambda y: jax.nn.gelu(y, approximate=False),
        Activation.GELU_TANH: jax.nn.gelu,
        Activation.RELU: jax.nn.relu,
        Activation.RELU2: lambda y: jax.nn.relu(y) ** 2,
    }[of.activation]
    hidden = activation(hidden[0]) * hidden[1] if of.gated else activation(hidden[0])
    out = jnp.einsum("blf,ef->ble", hidden, layer["w_out"])
    return out + layer["b_out"][None, None] if "w_out" in of.biases else out


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
    if isinstance(layers, dict):  # stacked
        return [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(model.num_layers)]
    return list(layers)
