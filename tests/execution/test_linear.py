"""The product that all linear layers share, against an einsum in float64, over the forms and numbers of rows that take other ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.hardware.platform import CPU
from partinf.partition.quantize import dequantize, quantize
from partinf.transformer.linear import dot

SHAPES = {  # weights of every spec that the model uses, by letter
    "te,hqe->thq": {"e": 12, "h": 3, "q": 4},
    "te,ckqe->tckq": {"e": 12, "c": 2, "k": 1, "q": 5},
    "te,cfe->tcf": {"e": 12, "c": 2, "f": 7},
    "tf,ef->te": {"f": 12, "e": 10},
    "re,ve->rv": {"e": 12, "v": 9},
}


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 65])
@pytest.mark.parametrize("spec", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_form_is_the_einsum(spec: str, rows: int, dtype: str) -> None:
    first, second = spec.split("->")[0].split(",")
    sizes = SHAPES[spec] | {first[0]: rows}
    rng = np.random.default_rng(rows)
    x = rng.standard_normal([sizes[letter] for letter in first]).astype(np.float32)
    weights = rng.standard_normal([sizes[letter] for letter in second]).astype(np.float32)
    if dtype == "int8":
        given = quantize(jnp.asarray(weights), (-1,))
        weights = np.asarray(dequantize(given, np.float32))
    else:
        given = jnp.asarray(weights, dtype)
        x, weights = (np.asarray(jnp.asarray(array, dtype), np.float32) for array in (x, weights))
    product = jax.jit(lambda x, given: dot(spec, x, given, jnp.float32))
    found = product(jnp.asarray(x, jnp.float32 if dtype == "int8" else dtype), given)
    want = np.einsum(spec, x.astype(np.float64), weights.astype(np.float64))
    np.testing.assert_allclose(found, want, atol=1e-4 if dtype == "int8" else 2e-5)


@pytest.mark.parametrize("rows", [1, 8, 65])
def test_a_table_is_met_by_its_columns(rows: int) -> None:
    """The look-up as a product, where neither argument is as the forms of products take it."""
    rng = np.random.default_rng(rows)
    x, table = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((rows, 12), (12, 12)))
    np.testing.assert_allclose(dot("tv,ve->te", x, table), np.asarray(x) @ np.asarray(table), atol=2e-5)


@pytest.mark.parametrize("rows", [1, 2, 7, 31, 64, 65])
@pytest.mark.parametrize("kind", ["f32", "bf16", "int8"])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 132), (12, 6)])
def test_products_on_a_cpu_change_no_number(rows: int, kind: str, inputs: int, outputs: int) -> None:
    """Every bfloat16 and every product of two is a float32, whatever x holds; the second size is none that the kernels take."""
    rng = np.random.default_rng(rows)
    x, weights = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((rows, inputs), (outputs, inputs)))
    if kind != "f32":
        x = x.astype(jnp.bfloat16)
        weights = quantize(weights, (-1,)) if kind == "int8" else weights.astype(jnp.bfloat16)
    there, here = (np.asarray(dot("te,oe->to", x, weights, jnp.float32, platform)) for platform in (None, CPU))
    np.testing.assert_allclose(here, there, atol=1e-4)
    spoilt = np.asarray(dot("te,oe->to", x.at[0].set(jnp.nan), weights, jnp.float32, CPU))
    np.testing.assert_array_equal(spoilt[1:], here[1:])
    assert np.isnan(spoilt[0]).all()


@pytest.mark.parametrize("rows", [3, 65])
def test_a_product_for_each_row(rows: int) -> None:
    """What the plain twin of attention asks for."""
    rng = np.random.default_rng(rows)
    probs, values = rng.standard_normal((rows, 2, 3, 1, 6)), rng.standard_normal((rows, 2, 6, 5))
    found = dot("bkglm,bkmq->bkglq", jnp.asarray(probs, jnp.float32), jnp.asarray(values, jnp.float32))
    np.testing.assert_allclose(found, np.einsum("bkglm,bkmq->bkglq", probs, values), atol=2e-5)
