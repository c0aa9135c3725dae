"""The TPU's kernel for prompts, interpreted, against the plain twin; alone, before earlier context, and in the step."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.foundation.limits import NEVER
from partinf.hardware import platform
from partinf.hardware.platform import CPU, PLATFORMS
from partinf.layout.files import make_layout
from partinf.transformer import cache
from partinf.transformer.cache import KeysValues
from partinf.transformer.kernels import prompt
from partinf.transformer.kernels import tiles as kernels
from partinf.transformer.kernels.tiles import Tiles
from tests.execution.harness import TOLERANCE, largest_error, make_plan

INTERPRETED = Tiles(8, 8, 1 << 12, fresh=True, interpret=True)
SIZE, PAGE = 128, 16


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "group", "how", "earlier"),
    [
        ("f32", 2, 3, kernels.Scores(), False),
        pytest.param("bf16", 1, 8, kernels.Scores(), False, marks=pytest.mark.slow),
        ("f32", 2, 1, kernels.Scores(scale=0.2, cap=3.0, window=7), False),
        ("f32", 2, 2, kernels.Scores(), True),
    ],
)
def test_the_kernel_equals_the_plain_twin(
    monkeypatch: pytest.MonkeyPatch, dtype: str, kv_heads: int, group: int, how: kernels.Scores, earlier: bool
) -> None:
    """Three prompts and padding in several blocks of queries and keys, none of them full; NaN in keys that no query sees."""
    monkeypatch.setattr(prompt, "kernel_tokens", lambda each: 16)
    monkeypatch.setattr(prompt, "KERNEL_KEYS", 128)
    kind, rng = {"f32": jnp.float32, "bf16": jnp.bfloat16}[dtype], np.random.default_rng(8)
    lengths, starts = (70, 5, 90), np.array([PAGE + 3, 0, 2 * PAGE]) if earlier else np.zeros(3, int)
    owner = np.repeat([0, 1, 2, -1], [*lengths, 15])
    position = np.concatenate([start + np.arange(n) for start, n in zip(starts, lengths, strict=True)] + [np.zeros(15, int)])
    q = jnp.asarray(rng.standard_normal((len(owner), kv_heads * group, SIZE)), kind)
    keys, values = rng.standard_normal((2, kv_heads, len(owner), SIZE))
    keys[:, owner < 0] = np.nan
    new = KeysValues(jnp.asarray(keys, kind), jnp.asarray(values, kind))
    pool = KeysValues(*(jnp.asarray(rng.standard_normal((6, kv_heads, PAGE, SIZE)), kind) for _ in range(2)))
    table = jnp.asarray([[0, 1, -1], [-1, -1, -1], [4, 2, 5]])

    def run(tiles: Tiles | None) -> tuple[np.ndarray, np.ndarray]:
        def attended(q: jax.Array, new: KeysValues, pool: KeysValues, owner: jax.Array, position: jax.Array) -> kernels.Attended:
            read = lambda ids: cache.read((pool,), 0, ids)  # noqa: E731
            context = kernels.Context(read, table, jnp.arange(3), jnp.asarray(starts)) if earlier else None
            return kernels.prefill(q, owner, position, kernels.Fresh(new, owner, position), context, tiles, how)

        found = jax.jit(attended)(q, new, pool, jnp.asarray(owner), jnp.asarray(position))
        return np.asarray(found.out, np.float32)[owner >= 0], np.asarray(found.mass)[owner >= 0]

    assert INTERPRETED.takes_prompts(q.shape[1], kv_heads, SIZE)
    for got, want in zip(run(INTERPRETED), run(None), strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype] / 5)


def test_fully_masked_pairs_of_blocks_are_skipped() -> None:
    owner, position = np.repeat([0, 1], 64), np.tile(np.arange(64), 2)
    seen = prompt._seen(*(jnp.asarray(x) for x in (owner, position, owner, position)), 32, 32)
    np.testing.assert_array_equal(seen.reshape(4, 4), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])
    seen = prompt._seen(*(jnp.asarray(x) for x in (owner[:1] + np.zeros(128, int), np.arange(128)) * 2), 32, 32, window=33)
    np.testing.assert_array_equal(seen.reshape(4, 4), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])


@pytest.mark.parametrize(("slots", "window"), [(1, NEVER), (4, NEVER), (1, 700), (3, 513)])
def test_the_pairs_that_are_priced_are_those_that_the_kernel_visits(slots: int, window: int) -> None:
    tokens, group = 6144, 4
    owner, position = np.repeat(np.arange(slots), tokens // slots), np.tile(np.arange(tokens // slots), slots)
    rows = platform.kernel_tokens(group)
    where = (jnp.asarray(x) for x in (owner, position, owner, position))
    seen = prompt._seen(*where, rows, platform.KERNEL_KEYS, 0 if window == NEVER else window)
    assert PLATFORMS["tpu"].tiles.kernel_pairs(tokens, slots, group, window) == int(seen.sum()) * rows * platform.KERNEL_KEYS


def test_steps_with_the_kernel_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "LANES", 1)
    monkeypatch.setitem(PLATFORMS, "cpu", replace(CPU, tiles=INTERPRETED))
    layout = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, {"x": "batch", "y": "heads", "z": "sequence"})
    assert largest_error(make_plan("2x2x2", layout)) < TOLERANCE["f32"]
