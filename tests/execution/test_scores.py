"""Scale, cap and window of scores in every form of attention, against a softmax written out for one query at a time."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.transformer import cache
from partinf.transformer.cache import KeysValues
from partinf.transformer.kernels import cpu as cpu_kernels
from partinf.transformer.kernels import tiles as kernels
from partinf.transformer.kernels.tiles import Scores, Tiles

HEADS, GROUPS, SIZE, PAGE, POOL = 6, 2, 16, 8, 24
NATIVE = Tiles(64, 128, 1 << 18, native=True)
SCORES = [Scores(0.4, 1.5), Scores(0.0, 0.0, 6), Scores(0.4, 1.5, 3)]


def needs_kernels(tiles: Tiles | None) -> None:
    if tiles is NATIVE and not cpu_kernels.available():
        pytest.skip("no C++ compiler")


def pool(rng: np.random.Generator) -> KeysValues:
    return KeysValues(*(jnp.asarray(rng.standard_normal((POOL, GROUPS, PAGE, SIZE)), jnp.float32) for _ in range(2)))


def lines(pages: KeysValues, table: np.ndarray) -> list[np.ndarray]:
    """Keys and values [positions, K, Q] of one page table."""
    return [np.asarray(half)[table].swapaxes(1, 2).reshape(-1, GROUPS, SIZE) for half in (pages.keys, pages.values)]


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """One query [H, Q] over the keys and values [M, K, Q] up to itself: output, and logarithm of the mass."""
    keys, values = (x[-scores.window :] if scores.window else x for x in (keys, values))
    out, mass = [], []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        found = keys[:, group] @ q[head] * (scores.scale or SIZE**-0.5)
        found = scores.cap * np.tanh(found / scores.cap) if scores.cap else found
        weights = np.exp(found)
        out.append(weights @ values[:, group] / weights.sum())
        mass.append(np.log(weights.sum()))
    return np.stack(out), np.stack(mass)


def same(found: kernels.Attended, row: int, wanted: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(found.out[row], wanted[0], atol=5e-6)
    np.testing.assert_allclose(found.mass[row], wanted[1], atol=5e-6)


FORMS = [None, Tiles(4, 4, 4 * 4 * HEADS), Tiles(8, 8, 2 * 8 * HEADS, skip=False), NATIVE]
PAGED = Tiles(8, 8, 1 << 18, paged=True, interpret=True)


@pytest.mark.parametrize(("tiles", "scores"), [*itertools.product(FORMS, SCORES), (PAGED, SCORES[2])])
def test_decode(tiles: Tiles | None, scores: Scores) -> None:
    needs_kernels(tiles)
    rng = np.random.default_rng(1)
    pages, position = pool(rng), np.array([0, 7, 8, 23, 39, -1])
    table = np.stack([rng.permutation(POOL)[:5] for _ in position])
    q = rng.standard_normal((len(position), HEADS, SIZE)).astype(np.float32)
    first = jnp.maximum(jnp.asarray(position) + 1 - scores.window, 0) if scores.window else None

    def run(q: jax.Array, table: jax.Array, position: jax.Array) -> kernels.Attended:
        read = lambda ids: cache.read((pages,), 0, ids)  # noqa: E731
        return kernels.decode(q, read, table, position, tiles, cache.stored((pages,), 0, table), scores, first)

    found = jax.jit(run)(q, jnp.asarray(table), jnp.asarray(position))
    for lane, last in enumerate(position[:-1]):
        keys, values = lines(pages, table[lane])
        same(found, lane, attention(q[lane], keys[: last + 1], values[: last + 1], scores))
    assert np.isfinite(found.out).all()


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("tiles", FORMS)
def test_prefill(tiles: Tiles | None, scores: Scores, earlier: bool) -> None:
    """Prompts that end before their window does, within it, and far beyond, in one tile and over several."""
    needs_kernels(tiles)
    rng = np.random.default_rng(2)
    pages, lengths, starts = pool(rng), (5, 1, 7, 90), np.array([6, 0, 19, 14, 3] if earlier else [0] * 5)
    owner = np.array([slot for slot, length in enumerate(lengths) for _ in range(length)] + [-1])  # slot 4 is empty
    position = np.array([starts[slot] + i for slot, length in enumerate(lengths) for i in range(length)] + [0])
    table = np.stack([rng.permutation(POOL)[:5] for _ in starts])
    q = rng.standard_normal((len(owner), HEADS, SIZE)).astype(np.float32)
    new = KeysValues(*(jnp.asarray(rng.standard_normal((GROUPS, len(owner), SIZE)), jnp.float32) for _ in range(2)))

    def run(q: jax.Array, table: jax.Array, starts: jax.Array, owner: jax.Array, position: jax.Array) -> kernels.Attended:
        read, slots = lambda ids: cache.read((pages,), 0, ids), jnp.arange(len(starts))
        before = jnp.maximum(position + 1 - scores.window, 0)
        floor = jnp.where(owner >= 0, jnp.minimum(before, starts[owner]), 0) if scores.window else None
        context = kernels.Context(read, table, slots, starts, cache.stored((pages,), 0, table), floor) if earlier else None
        return kernels.prefill(q, owner, position, kernels.Fresh(new, owner, position), context, tiles, scores)

    found = jax.jit(run)(q, *map(jnp.asarray, (table, starts, owner, position)))
    fresh = [np.asarray(half).swapaxes(0, 1) for half in (new.keys, new.values)]
    for token, slot in enumerate(owner[:-1]):
        mine = (owner == slot) & (position <= position[token])
        keys, values = (np.concatenate([old[: starts[slot]], own[mine]]) for old, own in zip(lines(pages, table[slot]), fresh, strict=True))
        same(found, token, attention(q[token], keys, values, scores))
    assert np.isfinite(found.out[:-1]).all()


@pytest.mark.parametrize("tiles", [FORMS[1], FORMS[3]])
def test_what_lies_before_every_window_is_not_read(tiles: Tiles) -> None:
    """Not even a NaN there reaches the output."""
    needs_kernels(tiles)
    pages = pool(np.random.default_rng(3))
    poisoned = jax.tree.map(lambda x: x.at[jnp.array([0, 1])].set(jnp.nan), pages)
    scores, q = Scores(window=8), jnp.ones((1, HEADS, SIZE))
    table, position, first = jnp.array([[0, 1, 2, 3]]), jnp.array([27]), jnp.array([20])
    owner, place, floor = jnp.zeros(1, int), jnp.array([32]), jnp.array([25])
    new = KeysValues(*(jnp.ones((GROUPS, 1, SIZE)) for _ in range(2)))

    @jax.jit
    def run(kv: KeysValues) -> list[jax.Array]:
        read, stored = lambda ids: cache.read((kv,), 0, ids), cache.stored((kv,), 0, table)
        context = kernels.Context(read, table, jnp.zeros(1, int), jnp.array([32]), stored, floor)
        prompt = kernels.prefill(q, owner, place, kernels.Fresh(new, owner, place), context, tiles, scores)
        return [kernels.decode(q, read, table, position, tiles, stored, scores, first).out, prompt.out]

    for got, wanted in zip(run(poisoned), run(pages), strict=True):
        np.testing.assert_array_equal(got, wanted)
