"""Attention tile by tile against its plain twin, and both against a softmax written out for one query at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.partition.quantize import dequantize, quantize
from partinf.transformer import cache
from partinf.transformer.cache import KeysValues
from partinf.transformer.kernels import tiles as kernels
from partinf.transformer.kernels.round_robin import num_seen
from partinf.transformer.kernels.tiles import Tiles

HEADS, GROUPS, SIZE, PAGE, POOL = 6, 2, 8, 4, 24


def pool(rng: np.random.Generator, int8: bool = False) -> KeysValues:
    both = [jnp.asarray(rng.standard_normal((POOL, GROUPS, PAGE, SIZE)), jnp.float32) for _ in range(2)]
    return KeysValues(*(quantize(half, (-1,)) if int8 else half for half in both))


def reader(pages: KeysValues) -> kernels.Read:
    return lambda ids: cache.read((pages,), 0, ids)


def whole(pages: KeysValues, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [positions, K, Q] of one page table."""
    halves = [half if isinstance(half, jax.Array) else dequantize(half, jnp.float32) for half in (pages.keys, pages.values)]
    keys, values = (np.asarray(half)[table].swapaxes(1, 2).reshape(-1, GROUPS, SIZE) for half in halves)
    return keys, values


def softmax_attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One query [H, Q] over keys and values [M, K, Q]."""
    out = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores = keys[:, group] @ q[head] * SIZE**-0.5
        weights = np.exp(scores - scores.max())
        out.append(weights @ values[:, group] / weights.sum())
    return np.stack(out)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tiles", [None, Tiles(4, 1, 1), Tiles(8, 1, 1, skip=False), Tiles(12, 1, 1), Tiles(512, 1, 1)])
def test_decode_reads_the_lanes_own_pages(tiles: Tiles | None, int8: bool) -> None:
    rng = np.random.default_rng(1)
    pages = pool(rng, int8)
    position = np.array([0, 3, 4, 11, 19, -1])
    table = np.stack([rng.permutation(POOL)[:5] for _ in position])
    for lane, last in enumerate(position):
        table[lane, last // PAGE + 1 :] = -1
    q = rng.standard_normal((len(position), HEADS, SIZE)).astype(np.float32)
    out = jax.jit(lambda q, t, p: kernels.decode(q, reader(pages), t, p, tiles).out)(q, table, position)
    for lane, last in enumerate(position[:-1]):
        keys, values = whole(pages, table[lane])
        np.testing.assert_allclose(out[lane], softmax_attention(q[lane], keys[: last + 1], values[: last + 1]), atol=2e-6)
    assert np.isfinite(out[-1]).all()


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    "tiles", [None, Tiles(1, 4, 4 * 4 * HEADS), Tiles(1, 8, 2 * 8 * HEADS, skip=False), Tiles(1, 4, 1), Tiles(1, 512, 1 << 20)]
)
def test_prompt_tokens_see_their_own_prompt_up_to_themselves(tiles: Tiles | None, earlier: bool) -> None:
    rng = np.random.default_rng(2)
    pages = pool(rng)
    lengths, starts = (5, 1, 7), np.array([6, 0, 9, 3] if earlier else [0, 0, 0, 0])
    owner = np.array([slot for slot, length in enumerate(lengths) for _ in range(length)] + [-1])  # slot 3 is empty
    position = np.array([starts[slot] + i for slot, length in enumerate(lengths) for i in range(length)] + [0])
    table = np.stack([rng.permutation(POOL)[:3] for _ in starts])
    q = rng.standard_normal((len(owner), HEADS, SIZE)).astype(np.float32)
    new = KeysValues(*(jnp.asarray(rng.standard_normal((GROUPS, len(owner), SIZE)), jnp.float32) for _ in range(2)))

    def run(q: jax.Array, table: jax.Array, starts: jax.Array) -> jax.Array:
        context = kernels.Context(reader(pages), table, jnp.arange(len(starts)), starts) if earlier else None
        fresh = kernels.Fresh(new, jnp.asarray(owner), jnp.asarray(position))
        return kernels.prefill(q, fresh.owner, fresh.position, fresh, context, tiles).out

    out = jax.jit(run)(q, table, starts)
    fresh_keys, fresh_values = (np.asarray(half).swapaxes(0, 1) for half in (new.keys, new.values))
    for token, slot in enumerate(owner[:-1]):
        old_keys, old_values = whole(pages, table[slot])
        mine = (owner == slot) & (position <= position[token])
        keys = np.concatenate([old_keys[: starts[slot]], fresh_keys[mine]])
        values = np.concatenate([old_values[: starts[slot]], fresh_values[mine]])
        np.testing.assert_allclose(out[token], softmax_attention(q[token], keys, values), atol=2e-6)
    assert np.isfinite(out[-1]).all()


@pytest.mark.parametrize("tiles", [None, Tiles(8, 1, 1)])
def test_parts_of_the_keys_come_together_by_their_mass(tiles: Tiles | None) -> None:
    """Pages distributed round-robin over three readers, one of which has nothing that the shortest lanes may see."""
    rng = np.random.default_rng(4)
    pages = pool(rng)
    position = np.array([2, 6, 11, 23])
    table = np.stack([rng.permutation(POOL)[:6] for _ in position])
    q = jnp.asarray(rng.standard_normal((len(position), HEADS, SIZE)), jnp.float32)
    decode = jax.jit(lambda q, pages, table, position: kernels.decode(q, reader(pages), table, position, tiles))
    found = []
    for part in range(3):
        seen = num_seen(jnp.asarray(position) + 1, jnp.arange(6)[part::3], PAGE)
        found.append(decode(q, pages, jnp.asarray(table[:, part::3]), seen - 1))
    assert found[2].mass[0].max() < -1e28  # saw no key
    shares = jax.nn.softmax(jnp.stack([one.mass for one in found]), axis=0)
    together = sum(share[..., None] * one.out for share, one in zip(shares, found, strict=True))
    whole_table = decode(q, pages, jnp.asarray(table), jnp.asarray(position))
    np.testing.assert_allclose(together, whole_table.out, atol=2e-6)
    np.testing.assert_allclose(jax.nn.logsumexp(jnp.stack([one.mass for one in found]), axis=0), whole_table.mass, atol=2e-6)


def test_a_fully_masked_tile_is_skipped() -> None:
    """What lies in pages beyond every lane's position is never read: not even a NaN there reaches the output."""
    pages = pool(np.random.default_rng(3))
    poisoned = jax.tree.map(lambda x: x.at[1].set(jnp.nan), pages)
    q = jnp.ones((1, HEADS, SIZE))
    table, position = jnp.array([[0, 1]]), jnp.array([PAGE - 1])
    decode = jax.jit(lambda pages, table: kernels.decode(q, reader(pages), table, position, Tiles(PAGE, 1, 1)).out)
    np.testing.assert_array_equal(decode(poisoned, table), decode(pages, table[:, :1]))


@pytest.mark.parametrize(
    ("tokens", "slots", "heads", "tiles"), [(64, 4, 2, Tiles(1, 8, 128)), (96, 3, 1, Tiles(1, 16, 96)), (40, 1, 4, Tiles(1, 16, 640))]
)
def test_shares_of_tiles_are_those_of_the_masks(tokens: int, slots: int, heads: int, tiles: Tiles) -> None:
    owner = np.arange(tokens) // -(-tokens // slots)
    visible = (owner[:, None] == owner[None, :]) & (np.arange(tokens)[:, None] >= np.arange(tokens)[None, :])
    length = tiles.queries(heads)
    pairs = [
        visible[row : row + length, column : column + tiles.prompt_keys].any()
        for row in range(0, tokens, length)
        for column in range(0, tokens, tiles.prompt_keys)
    ]
    met = [slot in owner[row : row + length] for row in range(0, tokens, length) for slot in range(slots)]
    assert tiles.seen_shares(tokens, slots, heads) == (np.mean(pairs), np.mean(met))
