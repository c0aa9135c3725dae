"""The TPU's kernel for decode, interpreted, against the plain twin; that a TPU's compiler takes it is shown in tests/proof."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.foundation.rounding import round_up
from partinf.hardware.platform import CPU, PLATFORMS
from partinf.layout.files import make_layout
from partinf.partition.quantize import Quantized, quantize
from partinf.transformer import cache
from partinf.transformer.cache import KeysValues
from partinf.transformer.kernels import paged_decode, paged_write
from partinf.transformer.kernels import tiles as kernels
from partinf.transformer.kernels.tiles import Tiles
from tests.execution.harness import MODEL, TOLERANCE, largest_error, make_plan

INTERPRETED = Tiles(8, 1, 1, paged=True, interpret=True)
LAYERS, POOL, PAGE, SIZE = 2, 9, 16, 8


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "group", "held", "first", "together", "joined"),
    [
        ("f32", 2, 3, 5, 0, 0, False),
        ("bf16", 1, 8, 4, 0, 0, True),
        ("f32", 4, 1, 1, 0, 0, False),
        ("f32", 1, 2, 5, 2, 0, True),
        ("f32", 2, 3, 5, 0, 2, False),
        ("f32", 2, 3, 5, 0, 2, True),
        ("bf16", 2, 2, 4, 3, 10, False),
    ],
)
def test_the_kernel_equals_the_plain_twin(
    monkeypatch: pytest.MonkeyPatch, dtype: str, kv_heads: int, group: int, held: int, first: int, together: int, joined: bool
) -> None:
    """Ragged lanes, random pages, an empty lane; blocks of two pages, of which the last is not full; NaN in every page not held.

    first: of the heads of a page that are read. together: heads of int8 pages, whose scales stand in one row; 0 for others. joined: keys
    and values side by side.
    """
    monkeypatch.setattr(paged_decode, "_MOST_KEYS", 2 * PAGE)
    kind, rng, layer = {"f32": jnp.float32, "bf16": jnp.bfloat16}[dtype], np.random.default_rng(4), 1
    position = np.minimum([0, PAGE - 1, PAGE, 3 * PAGE + 5, 5 * PAGE - 1, -1], held * PAGE - 1)
    table = np.stack([rng.permutation(POOL)[:held] for _ in position])
    for lane, last in enumerate(position):
        table[lane, last // PAGE + 1 :] = -1
    shape = (LAYERS, POOL, together or first + kv_heads, PAGE, SIZE)
    kv = KeysValues(*(jnp.asarray(rng.standard_normal(shape), kind) for _ in range(2)))
    if together:
        kv = KeysValues(*(in_rows(quantize(half, (-1,))) for half in (kv.keys, kv.values)))
    q = jnp.asarray(rng.standard_normal((len(position), kv_heads * group, SIZE)), kind)
    apart = cache.read(kv, layer, jnp.asarray(table))
    if joined:
        kv = side_by_side(kv)
        assert_equal(cache.read(kv, layer, jnp.asarray(table)), apart)

    def run(tiles: Tiles | None) -> tuple[np.ndarray, np.ndarray]:
        def attended(q: jax.Array, kv: KeysValues, table: jax.Array, position: jax.Array) -> kernels.Attended:
            read = lambda ids: jax.tree.map(lambda x: x[:, first : first + kv_heads], cache.read(kv, layer, ids))  # noqa: E731
            return kernels.decode(q, read, table, position, tiles, cache.stored(kv, layer, table, first))

        found = jax.jit(attended)(q, kv, jnp.asarray(table), jnp.asarray(position))
        return np.asarray(found.out, np.float32), np.asarray(found.mass)

    assert paged_decode.fits(cache.stored(kv, layer, jnp.asarray(table)).pages)
    for got, want in zip(run(INTERPRETED), run(None), strict=True):
        np.testing.assert_allclose(got[:-1], want[:-1], atol=TOLERANCE[dtype] / 10)
        assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("dtype", "heads", "apart", "joined"),
    [("f32", 3, True, False), ("bf16", 1, False, True), ("int8", 2, True, True), ("int8", 3, False, False)],
)
def test_a_token_per_lane_is_written_as_without_a_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: str, heads: int, apart: bool, joined: bool
) -> None:
    """Into pages of several tiles, in turns of two lanes; two lanes write nothing, one of which has no page. apart: layers, not a stack.
    joined: keys and values side by side, which read back as those that lie apart."""
    monkeypatch.setattr(paged_write, "_BUFFERS", 2 * 2 * heads * 128 * 32)
    rng, size, layer = np.random.default_rng(2), 32, 1
    kind = {"f32": jnp.float32, "bf16": jnp.bfloat16, "int8": jnp.float32}[dtype]
    kv = KeysValues(*(jnp.asarray(rng.standard_normal((LAYERS, POOL, heads, size, SIZE)), kind) for _ in range(2)))
    if dtype == "int8":
        kv = KeysValues(*(in_rows(quantize(half, (-1,))) for half in (kv.keys, kv.values)))
    lying_apart, kv = kv, side_by_side(kv) if joined else kv
    held = tuple(jax.tree.map(operator.itemgetter(number), kv) for number in range(LAYERS)) if apart else kv
    pages, offsets = jnp.asarray([4, 0, 8, -1, 3, 7]), jnp.asarray([0, 31, 8, 5, 17, 15])
    owned = jnp.asarray([True, True, False, False, True, True])
    new = KeysValues(*(jnp.asarray(rng.standard_normal((6, heads, SIZE)), kind).at[1, 0, 0].set(jnp.nan) for _ in range(2)))
    got, want = (
        jax.jit(functools.partial(kernels.write, tiles=tiles), static_argnums=1)(held, layer, pages, offsets, owned, new)
        for tiles in (INTERPRETED, None)
    )
    assert "paged_write" in str(jax.make_jaxpr(lambda held: kernels.write(held, layer, pages, offsets, owned, new, INTERPRETED))(held))
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    assert any((np.asarray(one) != np.asarray(before)).any() for one, before in zip(*map(jax.tree.leaves, (got, held)), strict=True))
    expected = cache.write(lying_apart, layer, pages, offsets, owned, new)
    assert_equal(cache.read(got, layer, jnp.arange(POOL)[None]), cache.read(expected, layer, jnp.arange(POOL)[None]))


def side_by_side(kv: KeysValues) -> cache.JoinedKeysValues:
    """The same cache with keys and values of a head in one row."""
    halves = (kv.keys, kv.values)
    if not isinstance(kv.keys, Quantized):
        return cache.JoinedKeysValues(jnp.concatenate(halves, axis=-1))
    return cache.JoinedKeysValues(jnp.concatenate([half.values for half in halves], axis=-1), tuple(half.scale for half in halves))


def assert_equal(one: object, other: object) -> None:
    for got, want in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def in_rows(half: Quantized) -> Quantized:
    """Pages [layers, P, K, S, Q] with the scales of all heads in one row of whole lanes, as a TPU's cache has them."""
    count, pages, heads, size, _ = half.shape
    row = round_up(heads * size, 128)
    flat = jnp.pad(half.scale.reshape(count, pages, 1, -1), [(0, 0)] * 3 + [(0, row - heads * size)], constant_values=jnp.nan)
    return Quantized(half.values, flat, half.contracted)


def test_only_pages_that_fill_their_tiles_are_taken() -> None:
    plain = jnp.zeros((4, 16, 8), jnp.bfloat16)
    assert paged_decode.fits(KeysValues(plain, plain))
    assert not paged_decode.fits(KeysValues(plain[:, :8], plain[:, :8]))
    int8 = quantize(jnp.zeros((4, 32, 8)), (-1,))  # with scales that fill no lanes
    assert not paged_decode.fits(KeysValues(int8, int8))
    assert paged_decode.fits(KeysValues(*[Quantized(int8.values, jnp.zeros((2, 1, 128)), (-1,))] * 2))
    assert not paged_decode.fits(KeysValues(*[Quantized(int8.values[:, :8], jnp.zeros((2, 1, 128)), (-1,))] * 2))


def test_steps_with_the_kernel_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the step itself: requests split over two axes, heads over the third; and pages of a request split over one."""
    monkeypatch.setattr(paged_decode, "_SUBLANES", 1)
    monkeypatch.setitem(PLATFORMS, "cpu", replace(CPU, tiles=INTERPRETED))
    layout = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, {"x": "batch", "y": "heads", "z": "batch"})
    assert largest_error(make_plan("2x2x2", layout)) < TOLERANCE["f32"]
    monkeypatch.setitem(PLATFORMS, "cpu", replace(CPU, tiles=INTERPRETED, lanes=2 * MODEL.head_dim))  # keys and values side by side
    few = replace(MODEL, num_kv_heads=4)  # two heads on a device, of which one is read
    assert largest_error(make_plan("2x4", make_layout({"x": "ffn", "y": "ffn"}, {"x": "heads", "y": "heads"}), few)) < TOLERANCE["f32"]
    layout = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, {"x": "batch", "y": "heads", "z": "sequence"})
    assert largest_error(make_plan("2x2x2", layout)) < TOLERANCE["f32"]


@pytest.mark.parametrize(("lanes", "declared"), [(2, 2 * 2 * 16 * 128 * 2 * 128), (32, 8 << 20)])
def test_a_compiler_covers_no_fetches_with_the_bytes_of_many_pages(lanes: int, declared: int) -> None:
    """It would share HBM between weights and pages, and leave it idle elsewhere."""
    pages = jax.ShapeDtypeStruct((1 << 14, 128, 128), jnp.int8)
    scales = jax.ShapeDtypeStruct((1 << 13, 1, 256), jnp.float32)
    half = Quantized(pages, scales, (-1,))
    q, rows = jax.ShapeDtypeStruct((lanes, 2, 8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((lanes, 16), jnp.int32)
    position = jax.ShapeDtypeStruct((lanes,), jnp.int32)
    traced = jax.make_jaxpr(lambda *given: paged_decode.paged_decode(*given, 1.0))(q, KeysValues(half, half), rows, position)
    (estimate,) = [one.params["cost_estimate"] for one in traced.jaxpr.eqns if one.primitive.name == "pallas_call"]
    assert (estimate.bytes_accessed, estimate.flops, estimate.transcendentals) == (declared, 0, 0)
