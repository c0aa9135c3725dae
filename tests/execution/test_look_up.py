"""Embeddings looked up by a product, as a TPU does where a device's columns fill no whole lanes, are those of the table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.plans import Bucket, Plan
from partinf.transformer.forward import _looked_up
from partinf.transformer.routes import Routes


def routes(slice_name: str) -> Routes:
    slice_ = parse_slice(slice_name)
    axes = dict.fromkeys((axis.name for axis in slice_.axes), "ffn")
    layout = make_layout(axes, dict.fromkeys(axes, "heads"))
    return Routes(Plan(ModelConfig("tiny", 1, 64, 128, 4, 4, 16, 500), slice_, layout), Bucket(8, 1))


@pytest.mark.parametrize(("slice_name", "columns", "multiplied"), [("v4:2x2x1", 72, True), ("v4:2x2x1", 128, False), ("cpu:4", 72, False)])
def test_rows_of_the_table(slice_name: str, columns: int, multiplied: bool) -> None:
    table = jax.random.normal(jax.random.key(0), (512, columns), jnp.bfloat16)
    tokens = jnp.asarray([0, 3, 499, 3, 511, 1, 1, 2])
    look_up = lambda table, tokens: _looked_up(table, tokens, routes(slice_name))  # noqa: E731
    found = look_up(table, tokens)
    assert found.dtype == table.dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(table[tokens], np.float32))
    assert ("dot_general" in str(jax.make_jaxpr(look_up)(table, tokens))) == multiplied


@pytest.mark.parametrize(("slice_name", "columns"), [("v4:2x2x1", 72), ("cpu:4", 72)])
def test_a_row_that_is_not_finite_is_found_by_its_token_alone(slice_name: str, columns: int) -> None:
    table = np.array(jax.random.normal(jax.random.key(0), (512, columns)), jnp.bfloat16)
    clean, tokens = table.copy(), jnp.asarray([0, 3, 499, 3, 511, 1, 1, 2])
    table[3, 5], table[2, 0], table[400] = np.nan, -np.inf, np.nan
    found, want = (np.asarray(_looked_up(jnp.asarray(each), tokens, routes(slice_name)), np.float32) for each in (table, clean))
    lost = np.isin(np.asarray(tokens), [2, 3])
    np.testing.assert_array_equal(found[~lost], want[~lost])
    assert (~np.isfinite(found[lost])).any(axis=1).all()
