"""What CPUs do in C++ between products against the operations that every other platform runs, in both types."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.model.kinds import Activation, FeedForward
from partinf.model.load import load_model_config
from partinf.transformer.attention import _contained
from partinf.transformer.kernels import cpu as cpu_kernels
from partinf.transformer.kernels import rows
from partinf.transformer.rope import Angles, rotate


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not cpu_kernels.available():
        pytest.skip("no C++ compiler")


TYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
PLAIN = load_model_config("llama-125m").layer_kinds[0].feed_forward
RNG = np.random.default_rng(3)


def drawn(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape) * 3, dtype)


def agree(got: jax.Array, want: jax.Array, dtype: jnp.dtype) -> None:
    """Both are rounded once to the type, whatever came before was float32."""
    assert got.dtype == dtype
    exact = 2**-8 if dtype == jnp.bfloat16 else 2**-20
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=exact, atol=1e-6)


@TYPES
@pytest.mark.parametrize(("tokens", "size", "offset"), [(1, 48, 0.0), (70, 768, 1.0)])
def test_norms(dtype: jnp.dtype, tokens: int, size: int, offset: float) -> None:
    x, weight, live = drawn(tokens, size, dtype=dtype), drawn(size, dtype=dtype), np.arange(tokens) % 3 != 1
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * (offset + np.asarray(weight, np.float64))
    agree(rows.norm(x, weight, 1e-5, offset, None), want, dtype)
    spoilt = jnp.where(live[:, None], x, jnp.nan)
    agree(rows.norm(spoilt, weight, 1e-5, offset, jnp.asarray(live)), np.where(live[:, None], want, 0), dtype)
    lost = rows.norm(x.at[0, 0].set(jnp.nan), weight, 1e-5, offset, None)
    np.testing.assert_array_equal(np.isnan(np.asarray(lost, np.float32)).all(-1), np.arange(tokens) == 0)


@TYPES
@pytest.mark.parametrize("of", [Activation.SILU, Activation.GELU_TANH, Activation.GELU_SIGMOID])
def test_gated_activations(dtype: jnp.dtype, of: Activation) -> None:
    how = replace(PLAIN, activation=of)
    hidden, live = drawn(9, 2, 64, dtype=dtype), np.arange(9) != 4
    hidden = hidden.at[0, 0, :4].set(jnp.asarray([-1e30, 1e30, -90.0, 90.0], dtype))
    hidden = hidden.at[1, 0, :2].set(jnp.asarray([jnp.nan, jnp.inf], dtype))
    assert rows.takes_gated(hidden, how)
    gate, up = (np.asarray(hidden[:, half], np.float64) for half in (0, 1))
    with np.errstate(over="ignore"):  # of exp, at either end
        part = {
            Activation.SILU: lambda: 1 / (1 + np.exp(-gate)),
            Activation.GELU_TANH: lambda: 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))),
            Activation.GELU_SIGMOID: lambda: 1 / (1 + np.exp(-1.702 * gate)),
        }[of]()
    want = np.where(live[:, None], gate * part * up, 0)
    agree(rows.gated(hidden, how, jnp.asarray(live)), want, dtype)


@pytest.mark.parametrize("change", [{"gated": False}, {"clamp": 7.0}, {"up_offset": 1.0}, {"activation": Activation.GELU}])
def test_activations_that_are_left_to_the_compiler(change: dict[str, object]) -> None:
    of: FeedForward = replace(PLAIN, **change)
    assert not rows.takes_gated(jnp.zeros((4, 2, 64)), of)
    assert not rows.takes_gated(jnp.zeros((4, 2, 24)), PLAIN)


@TYPES
@pytest.mark.parametrize(("half", "normed"), [(0, False), (32, False), (16, True)])
def test_heads_are_normalised_and_turned_and_values_that_are_no_numbers_contained(dtype: jnp.dtype, half: int, normed: bool) -> None:
    tokens, size = 33, 64
    q, new = drawn(tokens, 6, size, dtype=dtype), drawn(tokens, 2, 3, size, dtype=dtype)
    new = new.at[3, 0, 1, 5].set(jnp.inf).at[4, 1, 2, 6].set(jnp.nan)
    weight = drawn(size, dtype=dtype) if normed else None
    turned = drawn(tokens, 1, max(half, 1))
    by = Angles(jnp.cos(turned), jnp.sin(turned)) if half else None

    def plainly(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        if weight is not None:
            wide = (
                wide
                / jnp.sqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)
                * weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
            )
        return wide if by is None else rotate(wide, by)

    assert rows.takes_heads(q, by)
    scale = 2**-8 if dtype == jnp.bfloat16 else 2**-20
    for got, want in (
        (rows.heads(q, by, weight, 1e-5), plainly(q)),
        (rows.heads(new, by, weight, 1e-5), _contained(plainly(new[:, 0]), new[:, 1].astype(jnp.float32))),
    ):
        assert got.dtype == dtype
        assert got.shape == want.shape
        # The two halves of a pair may cancel each other: an error of their magnitude.
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=scale, atol=scale * 8)
