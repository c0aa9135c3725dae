"""The definition of the model: one device, no cache, no padding, no sharding. Everything that is partitioned must equal this.

Letters as in `partinf.axes`: B sequences of L tokens, E d_model, F d_ff, H query heads in groups of G per key-value head K, Q d_head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from partinf.model.config import Activation, Block, ModelConfig, Norm, Position
from partinf.transformer.params import Params
from partinf.transformer.rope import angles, rotate


def forward(params: Params, model: ModelConfig, tokens: jax.Array, served: int = 0) -> jax.Array:
    """Logits [B, L, V] (float32, V unpadded) of tokens [B, L], every sequence starting at position 0.

    Args:
        served: the longest context that the deployment serves, by which some rotations are chosen; L by default.
    """
    served = served or tokens.shape[1]
    x = params["embed"][tokens]  # [B, L, E]
    if model.position is Position.LEARNED:
        x = x + params["positions"][None, : tokens.shape[1]]
    for layer in _layers(params, model):
        h = _norm(x, layer, "attention_norm", model)
        attended = _attention(layer, model, h, served)
        if model.block is Block.PARALLEL:
            x = x + attended + _ffn(layer, model, h)
        else:
            x = x + attended
            x = x + _ffn(layer, model, _norm(x, layer, "ffn_norm", model))
    x = _norm(x, params, "final_norm", model)
    table = params.get("unembed", params["embed"])
    return jnp.einsum("ble,ve->blv", x, table, preferred_element_type=jnp.float32)[..., : model.vocab_size]


def greedy(params: Params, model: ModelConfig, prompt: list[int], count: int) -> list[int]:
    """The `count` most likely next tokens, one after the other, each from a forward pass over everything before it."""
    tokens = list(prompt)
    step = jax.jit(forward, static_argnums=1)
    padded = len(prompt) + count
    for _ in range(count):
        row = jnp.asarray([tokens + [0] * (padded - len(tokens))])  # later tokens do not reach earlier positions
        tokens.append(int(jnp.argmax(step(params, model, row)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def _attention(layer: Params, model: ModelConfig, x: jax.Array, served: int) -> jax.Array:
    positions = jnp.arange(x.shape[1])[None, :]  # [1, L]
    q = jnp.einsum("ble,hqe->blhq", x, layer["wq"])
    k = jnp.einsum("ble,kqe->blkq", x, layer["wkv"][0])
    v = jnp.einsum("ble,kqe->blkq", x, layer["wkv"][1])
    if "wq" in model.biases:
        q = q + layer["bq"][None, None]
    if "wkv" in model.biases:
        k, v = k + layer["bkv"][0][None, None], v + layer["bkv"][1][None, None]
    if model.qk_norm:
        q, k = _rms(q, model) * layer["q_norm"][None, None, None], _rms(k, model) * layer["k_norm"][None, None, None]
    if model.position is Position.ROPE:
        by = angles(positions, model.rotation, model.head_dim, served)
        q, k = rotate(q, by), rotate(k, by)
    q = q.reshape(*q.shape[:2], model.num_kv_heads, model.queries_per_kv_head, model.head_dim)  # [B, L, K, G, Q]
    scores = jnp.einsum("blkgq,bmkq->bkglm", q, k, preferred_element_type=jnp.float32) * model.head_dim**-0.5
    causal = (positions[:, :, None] >= positions[:, None, :])[:, None, None]  # [1, 1, 1, L, M]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(x.dtype)
    out = jnp.einsum("bkglm,bmkq->blkgq", weights, v).reshape(*x.shape[:2], model.num_heads * model.head_dim)
    out = jnp.einsum("blf,ef->ble", out, layer["wo"])
    return out + layer["bo"][None, None] if "wo" in model.biases else out


def _ffn(layer: Params, model: ModelConfig, x: jax.Array) -> jax.Array:
    hidden = jnp.einsum("ble,cfe->cblf", x, layer["w_in"])  # gate and up, or one matrix
    if "w_in" in model.biases:
        hidden = hidden + layer["b_in"][:, None, None]
    activation = {
        Activation.SILU: jax.nn.silu,
        Activation.GELU: lambda y: jax.nn.gelu(y, approximate=False),
        Activation.GELU_TANH: jax.nn.gelu,
        Activation.RELU: jax.nn.relu,
    }[model.activation]
    hidden = activation(hidden[0]) * hidden[1] if model.gated else activation(hidden[0])
    out = jnp.einsum("blf,ef->ble", hidden, layer["w_out"])
    return out + layer["b_out"][None, None] if "w_out" in model.biases else out


def _norm(x: jax.Array, weights: Params, name: str, model: ModelConfig) -> jax.Array:
    if model.norm is Norm.RMS:
        return _rms(x, model) * weights[name][None, None]
    centred = x.astype(jnp.float32) - jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)
    return _rms(centred, model).astype(x.dtype) * weights[name][None, None] + weights[f"{name}_bias"][None, None]


def _rms(x: jax.Array, model: ModelConfig) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + model.norm_eps)).astype(x.dtype)


def _layers(params: Params, model: ModelConfig) -> list[Params]:
    layers = params["layers"]
    if isinstance(layers, dict):  # stacked
        return [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(model.num_layers)]
    return list(layers)
