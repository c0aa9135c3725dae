"""The definition of the model: one device, no cache, no padding, no sharding. Everything that is partitioned must equal this.

Letters as in `partinf.axes`: B sequences of L tokens, E d_model, F d_ff, H query heads in groups of G per key-value head K, Q d_head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from partinf.model_config import ModelConfig
from partinf.transformer.params import Params
from partinf.transformer.rope import frequencies, rotate


def forward(params: Params, model: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Logits [B, L, V] (float32, V unpadded) of tokens [B, L], every sequence starting at position 0."""
    x = params["embed"][tokens]  # [B, L, E]
    for layer in _layers(params, model):
        x = x + _attention(layer, model, _norm(x, layer["attention_norm"], model))
        x = x + _ffn(layer, _norm(x, layer["ffn_norm"], model))
    x = _norm(x, params["final_norm"], model)
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


def _attention(layer: Params, model: ModelConfig, x: jax.Array) -> jax.Array:
    length, group = x.shape[1], model.queries_per_kv_head
    positions, freqs = jnp.arange(length)[None, :], frequencies(model)  # [1, L]
    q = rotate(jnp.einsum("ble,hqe->blhq", x, layer["wq"]), positions, freqs)
    k = rotate(jnp.einsum("ble,kqe->blkq", x, layer["wkv"][0]), positions, freqs)
    v = jnp.einsum("ble,kqe->blkq", x, layer["wkv"][1])
    q = q.reshape(*q.shape[:2], model.num_kv_heads, group, model.head_dim)  # [B, L, K, G, Q]
    scores = jnp.einsum("blkgq,bmkq->bkglm", q, k, preferred_element_type=jnp.float32) * model.head_dim**-0.5
    causal = (positions[:, :, None] >= positions[:, None, :])[:, None, None]  # [1, 1, 1, L, M]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(x.dtype)
    out = jnp.einsum("bkglm,bmkq->blkgq", weights, v).reshape(*x.shape[:2], model.num_heads, model.head_dim)
    return jnp.einsum("blhq,ehq->ble", out, layer["wo"])


def _ffn(layer: Params, x: jax.Array) -> jax.Array:
    gate, up = jnp.einsum("ble,fe->blf", x, layer["w_in"][0]), jnp.einsum("ble,fe->blf", x, layer["w_in"][1])
    return jnp.einsum("blf,ef->ble", jax.nn.silu(gate) * up, layer["w_out"])


def _norm(x: jax.Array, scale: jax.Array, model: ModelConfig) -> jax.Array:
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + model.norm_eps)
    return normed.astype(x.dtype) * scale[None, None, :]


def _layers(params: Params, model: ModelConfig) -> list[Params]:
    layers = params["layers"]
    if isinstance(layers, dict):  # stacked
        return [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(model.num_layers)]
    return list(layers)
