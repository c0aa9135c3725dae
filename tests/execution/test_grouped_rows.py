"""Rows times the matrix of their group, by the kernels for TPUs (run without one) and CPUs and by XLA, against loops."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.hardware.platform import PLATFORMS
from partinf.partition.quantize import Quantized, dequantize, quantize
from partinf.transformer.grouped import added_up, grouped_dot, sorted_by_expert, stable_order
from partinf.transformer.kernels import grouped_rows
from partinf.transformer.params import OneOf

LAYERS, GROUPS = 3, 6
SHAPES = {"whole lanes": (128, 128), "others": (184, 136), "turned": (128, 72)}  # outputs of either of two matrices, inputs


def stacked(shape: str, quantized: bool) -> Any:
    weights = np.random.default_rng(0).standard_normal((LAYERS, GROUPS, 2, *SHAPES[shape]))
    found = jnp.asarray(weights, jnp.bfloat16)
    return quantize(found, (-1,)) if quantized else found


def expected(x: jax.Array, weights: Any, layer: int, sizes: np.ndarray) -> np.ndarray:
    whole = np.asarray(dequantize(weights, jnp.float32) if isinstance(weights, Quantized) else weights, np.float32)[layer]
    bounds = np.cumsum([0, *sizes])
    parts = [np.einsum("rk,cfk->rcf", np.asarray(x, np.float32)[a:b], whole[g]) for g, (a, b) in enumerate(itertools.pairwise(bounds))]
    return np.concatenate(parts)


@pytest.mark.parametrize("most", [7, 1 << 30], ids=["as one number", "as two"])
def test_equal_numbers_are_sorted_as_they_come(most: int) -> None:
    numbers = np.append(np.random.default_rng(0).integers(0, 7, 63), most)
    assert (np.asarray(stable_order(jnp.asarray(numbers), most)) == np.argsort(numbers, kind="stable")).all()


SIZES = {
    "even": [50] * GROUPS,
    "one group": [0, 0, 0, 0, 0, 300],
    "some empty, some rows of none": [3, 0, 130, 0, 7, 0],
    "no rows": [0] * GROUPS,
}


@pytest.mark.parametrize(("shape", "quantized"), [("whole lanes", True), ("others", False), ("turned", False)])
def test_every_row_meets_the_matrix_of_its_group(shape: str, quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layer in the middle of a stack, by the kernels and by the product that XLA has; in blocks of 128 outputs, of which the last
    may be shorter."""
    monkeypatch.setattr(grouped_rows, "GROUPED_BLOCK", 2 * 136 * 128)
    monkeypatch.setattr(grouped_rows, "grouped_rows", functools.partial(grouped_rows.grouped_rows, interpret=True))
    weights = stacked(shape, quantized)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((300, SHAPES[shape][1])), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=2)
    def product(sizes: jax.Array, layer: jax.Array, platform: str) -> jax.Array:
        group = jnp.repeat(jnp.arange(GROUPS), sizes, total_repeat_length=300)
        rows = replace(sorted_by_expert(group[:, None], GROUPS), expert=group, sizes=sizes)
        return grouped_dot(x, OneOf(weights, layer), rows, jnp.float32, PLATFORMS.get(platform), "experts_in")

    for sizes in SIZES.values():
        wanted = expected(x, weights, 1, np.asarray(sizes))
        for platform in ("none", "cpu", "tpu"):
            got = np.asarray(product(jnp.asarray(sizes, jnp.int32), jnp.asarray(1), platform))[: len(wanted)]
            np.testing.assert_allclose(got, wanted, rtol=2e-2, atol=2e-2)


def test_what_is_smaller_than_a_tile_is_left_to_the_compiler() -> None:
    x = jnp.zeros((16, 128), jnp.bfloat16)
    assert grouped_rows.fits(x, jnp.zeros((2, 1, 192, 128), jnp.bfloat16))
    assert grouped_rows.fits(x, jnp.zeros((2, 1, 96, 128), jnp.bfloat16))
    assert not grouped_rows.fits(x, jnp.zeros((2, 1, 96, 96), jnp.bfloat16))
    assert not grouped_rows.fits(x, jnp.zeros((2, 2, 192, 132), jnp.bfloat16))
    assert not grouped_rows.fits(x.astype(jnp.float32), jnp.zeros((2, 1, 256, 128), jnp.float32))


def test_blocks_are_as_large_as_the_chip_holds() -> None:
    """Outputs at once of published sizes, by how their matrices are split."""
    assert grouped_rows._width(2, 768, 2048) == 384  # Qwen 3 30B-A3B
    assert grouped_rows._width(2, 192, 2048) == 192
    assert grouped_rows._width(1, 2880, 360) == 2880  # gpt-oss, by d_ff over eight
    assert grouped_rows._width(1, 2880, 2880) == 640  # the last of five shorter
    assert grouped_rows._width(2, 14336, 4096) == 256  # Mixtral


def test_copies_are_sorted_and_found_again() -> None:
    """Four tokens, two experts each, of which this device holds three; 3 stands for those that it does not."""
    chosen = jnp.asarray([[2, 0], [3, 3], [0, 3], [1, 2]])
    rows = sorted_by_expert(chosen, 3)
    assert rows.token.tolist()[:5] == [0, 2, 3, 0, 3]
    assert rows.expert.tolist()[:5] == [0, 0, 1, 2, 2]
    assert rows.sizes.tolist() == [2, 1, 2]
    assert rows.place.tolist() == [[3, 0], [8, 8], [1, 8], [2, 4]]
    out, weights = jnp.arange(16.0).reshape(8, 2).at[5:].set(jnp.nan), jnp.asarray([[0.5, 2.0]] * 4)
    for platform in (None, PLATFORMS["tpu"]):  # one after the other, and all at once
        assert added_up(out, weights, rows, platform).tolist() == [[3.0, 5.5], [0.0, 0.0], [1.0, 1.5], [18.0, 20.5]]
    whole = sorted_by_expert(jnp.asarray([[2, 0], [1, 2]]), 3, whole=True)
    for platform in (None, PLATFORMS["tpu"]):
        assert added_up(out[:4], weights[:2], whole, platform).tolist() == [[2.0, 4.5], [13.0, 15.5]]
