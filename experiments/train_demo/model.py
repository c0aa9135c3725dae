"""The demo model in Flax nnx: a Llama-shaped decoder, as small as the tasks allow.

Serial blocks, RMSNorm, grouped-query attention with rotary embeddings in Hugging Face's rotate-half form, SwiGLU, no biases. Every
parameter is one `nnx.Param` leaf whose path, shape and [out, in] order are those of partinf's own parameter tree, so that converting
is renaming. Letters: V vocabulary, E d_model, H query heads, K kv heads, Q head dim, F d_ff, T tokens, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class DemoConfig:
    """Dimensions. Heads, widths and vocabulary divide by 8, so the model can be split over 8 devices in every way."""

    vocab_size: int
    d_model: int = 64
    d_ff: int = 192
    num_layers: int = 3
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 16
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    max_len: int = 128


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """[..., E] scaled to unit root mean square, times `weight` [E]; computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weight * wide.astype(x.dtype)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding of [B, T, heads, Q] at positions 0..T-1: dimension i turns together with i + Q/2 (Hugging Face's rotate_half)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies  # [T, Q/2]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """Attention, then SwiGLU, each on the normalised residual stream."""

    def __init__(self, config: DemoConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        e, f, h, k, q = config.d_model, config.d_ff, config.num_heads, config.num_kv_heads, config.head_dim
        into_residual = (2 * config.num_layers) ** -0.5  # keeps the variance of the residual stream independent of depth

        def normal(shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape) * scale * fan_in**-0.5)

        self.attention_norm = nnx.Param(jnp.ones(e))
        self.wkv = normal((2, k, q, e), e)
        self.wq = nnx.Param(jnp.repeat(self.wkv[0], h // k, axis=0))  # queries start as keys: a token is drawn to others like it
        self.wo = normal((e, h, q), h * q, into_residual)
        self.ffn_norm = nnx.Param(jnp.ones(e))
        self.w_in = normal((2, f, e), e)
        self.w_out = normal((e, f), f, into_residual)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, E] to [B, T, E]."""
        x = x + self.attention(rms_norm(x, self.attention_norm[...], self.config.rms_norm_eps))
        return x + self.ffn(rms_norm(x, self.ffn_norm[...], self.config.rms_norm_eps))

    def attention(self, x: jax.Array) -> jax.Array:
        """Causal grouped-query attention: query heads h read kv head h // (H/K)."""
        c = self.config
        batch, length, _ = x.shape
        q = rotate(jnp.einsum("bte,hqe->bthq", x, self.wq[...]), c.rope_theta)
        k, v = (jnp.einsum("bte,kqe->btkq", x, weight) for weight in self.wkv[...])
        k = rotate(k, c.rope_theta)
        q = q.reshape(batch, length, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)
        scores = jnp.einsum("btkgq,bskq->bkgts", q, k).astype(jnp.float32) * c.head_dim**-0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bkgts,bskq->btkgq", weights, v).reshape(batch, length, c.num_heads, c.head_dim)
        return jnp.einsum("bthq,ehq->bte", mixed, self.wo[...])

    def ffn(self, x: jax.Array) -> jax.Array:
        """SwiGLU: w_out (silu(gate x) * up x)."""
        gate, up = (jnp.einsum("bte,fe->btf", x, weight) for weight in self.w_in[...])
        return jnp.einsum("btf,ef->bte", jax.nn.silu(gate) * up, self.w_out[...])


class DemoModel(nnx.Module):
    """Tokens [B, T] to logits [B, T, V]."""

    def __init__(self, config: DemoConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        table = (config.vocab_size, config.d_model)
        self.embed = nnx.Param(jax.random.normal(rngs.params(), table) * 0.5)
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])
        self.final_norm = nnx.Param(jnp.ones(config.d_model))
        self.unembed = nnx.Param(jax.random.normal(rngs.params(), table) * config.d_model**-0.5)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.logits(self.hidden_states(tokens)[-1])

    def hidden_states(self, tokens: jax.Array) -> list[jax.Array]:
        """The residual stream [B, T, E] before the first block and after every block."""
        states = [self.embed[...][tokens]]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states

    def logits(self, x: jax.Array) -> jax.Array:
        """Residual stream [B, T, E] to logits [B, T, V]."""
        return jnp.einsum("bte,ve->btv", rms_norm(x, self.final_norm[...], self.config.rms_norm_eps), self.unembed[...])
