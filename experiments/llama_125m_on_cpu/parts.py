"""What each of the ways around XLA's slow paths on CPU saves, measured alone at the sizes of the 125 M model. Writes parts.json.

    python -m experiments.llama_125m_on_cpu.parts        # half a minute

Both ways of a pair take turns; figures are medians of eleven calls, in milliseconds, each over several arrays so that weights come from
memory and not from a cache.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from experiments.results import write
from partinf.hardware.platform import CPU
from partinf.transformer import cache
from partinf.transformer.cache import KeysValues
from partinf.transformer.kernels import tiles as kernels
from partinf.transformer.linear import dot

LAYERS, HEADS, GROUPS, SIZE, EMBED, WIDE, PAGE, CONTEXT = 12, 12, 4, 64, 768, 4096, 64, 256
_RNG = np.random.default_rng(0)


def array(dtype: Any, *shape: int) -> jax.Array:
    return jnp.asarray(_RNG.standard_normal(shape), dtype)


def turns(ways: dict[str, Callable[..., Any]], *arguments: Any, calls: int = 11) -> dict[str, float]:
    """Median milliseconds of every way."""
    compiled = {name: jax.jit(way).lower(*arguments).compile() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for call in range(calls + 1):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if call:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(found) for name, found in seconds.items()}


def attention(rows: int) -> dict[str, float]:
    """Decode cores of all layers over a context of 256."""
    pages = rows * CONTEXT // PAGE
    caches = [KeysValues(*(array(jnp.float32, pages, GROUPS, PAGE, SIZE) for _ in range(2))) for _ in range(LAYERS)]
    table = jnp.asarray(_RNG.permutation(pages).reshape(rows, -1))
    position = jnp.full(rows, CONTEXT - 1)

    def cores(tiles: kernels.Tiles | None) -> Callable[..., jax.Array]:
        def run(q: jax.Array, caches: list[KeysValues]) -> jax.Array:
            for kv in caches:
                read = lambda ids, kv=kv: cache.read((kv,), 0, ids)  # noqa: E731
                q = kernels.decode(q, read, table, position, tiles, cache.stored((kv,), 0, table)).out
            return q

        return run

    return turns(ways(cores), array(jnp.float32, rows, HEADS, SIZE), caches)


def ways(cores: Callable[[kernels.Tiles | None], Callable[..., jax.Array]]) -> dict[str, Callable[..., jax.Array]]:
    """The three forms of attention: everything gathered, tile by tile in XLA, and the CPU's own kernels."""
    native = CPU.tiles
    return {"gathered": cores(None), "tiled": cores(replace(native, native=False)), "native": cores(native)}


def prompt_attention(tokens: int) -> dict[str, float]:
    """Cores of all layers for one prompt."""
    fresh = [KeysValues(*(array(jnp.float32, GROUPS, tokens, SIZE) for _ in range(2))) for _ in range(LAYERS)]
    owner, position = jnp.zeros(tokens, jnp.int32), jnp.arange(tokens)

    def cores(tiles: kernels.Tiles | None) -> Callable[..., jax.Array]:
        def run(q: jax.Array, fresh: list[KeysValues]) -> jax.Array:
            for new in fresh:
                q = kernels.prefill(q, owner, position, kernels.Fresh(new, owner, position), None, tiles).out
            return q

        return run

    return turns(ways(cores), array(jnp.float32, tokens, HEADS, SIZE), fresh)


def products(rows: int, dtype: Any) -> dict[str, float]:
    """Six products with a matrix of the FFN: an einsum as it stands, and the library's, for XLA alone and for this CPU."""
    weights = [array(dtype, WIDE, EMBED) for _ in range(6)]
    return turns(multiplied("te,fe->tf", dtype), array(dtype, rows, EMBED), weights)


def heads(rows: int) -> dict[str, float]:
    """Six products with W_Q as it is stored."""
    weights = [array(jnp.float32, HEADS, SIZE, EMBED) for _ in range(6)]
    return turns(multiplied("te,hqe->thq", jnp.float32), array(jnp.float32, rows, EMBED), weights)


def multiplied(spec: str, dtype: Any) -> dict[str, Callable[..., Any]]:
    plain = lambda x, w: jnp.einsum(spec, x, w, preferred_element_type=jnp.float32).astype(dtype)  # noqa: E731
    return {
        "einsum": lambda x, ws: [plain(x, w) for w in ws],
        "dot": lambda x, ws: [dot(spec, x, w) for w in ws],
        "on CPU": lambda x, ws: [dot(spec, x, w, platform=CPU) for w in ws],
    }


def scatter(rows: int) -> dict[str, float]:
    """New keys of all layers into pages for 32 sequences, the pages given away and updated in place."""
    pages = 32 * CONTEXT // PAGE
    where = jnp.asarray(_RNG.permutation(pages)[:rows])
    new = array(jnp.bfloat16, rows, GROUPS, SIZE)
    found = {}
    for name, dtype in (("bfloat16", jnp.bfloat16), ("bits", jnp.uint16)):
        held = [jnp.zeros((pages, GROUPS, PAGE, SIZE), dtype) for _ in range(LAYERS)]
        part = jax.lax.bitcast_convert_type(new, dtype) if name == "bits" else new
        write = jax.jit(lambda held, part: [x.at[where, :, 3].set(part, mode="drop") for x in held], donate_argnums=0)
        seconds = []
        for _ in range(12):
            start = time.perf_counter()
            held = jax.block_until_ready(write(held, part))
            seconds.append(time.perf_counter() - start)
        found[name] = 1e3 * statistics.median(seconds[1:])
    return found


def main() -> None:
    found = {
        "attention of 12 layers, batch 8": attention(8),
        "attention of 12 layers, batch 32": attention(32),
        "attention of 12 layers, prompt of 512": prompt_attention(512),
        "products with W_Q [12, 64, 768], float32, 8 rows": heads(8),
        "products with [4096, 768], float32, 2 rows": products(2, jnp.float32),
        "products with [4096, 768], float32, 8 rows": products(8, jnp.float32),
        "products with [4096, 768], float32, 32 rows": products(32, jnp.float32),
        "products with [4096, 768], bfloat16, 1 row": products(1, jnp.bfloat16),
        "products with [4096, 768], bfloat16, 2 rows": products(2, jnp.bfloat16),
        "products with [4096, 768], bfloat16, 32 rows": products(32, jnp.bfloat16),
        "products with [4096, 768], bfloat16, 512 rows": products(512, jnp.bfloat16),
        "writing 8 rows into bfloat16 pages": scatter(8),
    }
    for name, times in found.items():
        print(f"{name:52}", "  ".join(f"{way} {milliseconds:7.2f} ms" for way, milliseconds in times.items()))
    write(__file__, found, "parts.json")


if __name__ == "__main__":
    main()
