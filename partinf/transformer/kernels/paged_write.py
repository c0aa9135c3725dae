"""One token per lane into the lane's page, as a kernel for TPUs: rows travel to HBM, and the cache stays where it lies.

XLA's scatter of a few rows is done in place, but its compiler brings the whole part of the cache that a layer has on chip for it, and
back. Here the tile that holds the token's place is fetched for every lane and head, the token put into it, and the tile sent back; operand
and result are pinned to HBM. Lanes write pages of their own, so no two of them meet in a tile.

Letters as in `paged_decode`: B lanes, K key-value heads, Q d_head, S tokens of a page.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from partinf.hardware.platform import TILE_COLUMN
from partinf.partition.quantize import Quantized, quantize
from partinf.transformer.cache import JoinedKeysValues, KeysValues, joined
from partinf.transformer.kernels.paged_decode import apart

_BUFFERS = 2 << 20  # bytes of on-chip memory for tiles


Pages = KeysValues | JoinedKeysValues


def paged_write(pages: Pages, rows: jax.Array, offsets: jax.Array, new: KeysValues, interpret: bool = False) -> Pages:
    """The pages with new keys and values [B, K, Q] in their places.

    Args:
        pages: as `paged_decode` takes them, [R, S, Q] or [R, S, 2Q], all K heads of a page one after the other; scales [R / K, 1, lanes].
        rows: [B], where the page of each lane begins, -1 for a lane that writes nothing. offsets: [B], places within the pages.
        interpret: run without a TPU.
    """
    held, scales = apart(pages)
    added, factors = _levels(pages, new)
    wide = [one.astype(jnp.float32) for one in added]
    lanes, heads, size = wide[0].shape
    length, dtype = held[0].shape[1], held[0].dtype
    tile = min(length, TILE_COLUMN // dtype.itemsize) if length % (TILE_COLUMN // dtype.itemsize) == 0 else length
    most = max(1, _BUFFERS // (len(held) * heads * tile * max(size, 128) * dtype.itemsize))
    chunk = max(count for count in range(1, min(most, lanes) + 1) if lanes % count == 0)
    targets = [*held, *scales]
    buffers = [pltpu.VMEM((chunk, heads, tile, size), dtype)] * len(held) + [
        pltpu.VMEM((chunk, 1, one.shape[-1]), one.dtype) for one in scales
    ]
    first = 2 + len(wide) + len(factors)
    block = pl.BlockSpec((chunk, heads, size), lambda chunk, *_: (chunk, 0, 0))
    found = pl.pallas_call(
        functools.partial(_kernel, tile=tile, num_pages=len(held), num_scales=len(scales)),
        out_shape=tuple(pltpu.HBM(one.shape, one.dtype) for one in targets),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(lanes // chunk,),
            in_specs=[block] * len(wide)
            + [pl.BlockSpec(memory_space=pltpu.SMEM)] * len(factors)
            + [pl.BlockSpec(memory_space=pl.ANY)] * len(targets),
            out_specs=tuple(pl.BlockSpec(memory_space=pl.ANY) for _ in targets),
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((2,))],
        ),
        input_output_aliases={first + number: number for number in range(len(targets))},
        interpret=interpret,
        name="paged_write",
    )(rows, offsets, *wide, *factors, *targets)
    if isinstance(pages, JoinedKeysValues):
        return JoinedKeysValues(found[0], tuple(found[1:]))
    halves = found[:2] if not scales else [Quantized(one, scale, (-1,)) for one, scale in zip(found[:2], found[2:], strict=True)]
    return KeysValues(*halves)


def _levels(pages: Pages, new: KeysValues) -> tuple[list[jax.Array], list[jax.Array]]:
    """What is written into each array of pages, and the scales [B · K] of int8."""
    if isinstance(pages, JoinedKeysValues):
        both = joined(pages, new)
        return [both.both], [scale.reshape(-1) for scale in both.scales]
    if not isinstance(pages.keys, Quantized):
        return [new.keys, new.values], []
    levels = [quantize(part, (-1,)) for part in (new.keys, new.values)]
    return [one.values for one in levels], [one.scale.reshape(-1) for one in levels]


def _kernel(rows: Any, offsets: Any, *others: Any, tile: int, num_pages: int, num_scales: int) -> None:
    """Some lanes. `others`: new keys and values, their scales if they have any, the cache as it was, the cache, buffers, semaphores."""
    new, others = others[:num_pages], others[num_pages:]
    factors, others = others[:num_scales], others[num_scales:]
    count = num_pages + num_scales
    targets, (*buffers, arrived) = others[count : 2 * count], others[2 * count :]
    chunk, heads, _, size = buffers[0].shape
    length, begin = targets[0].shape[1], pl.program_id(0) * chunk

    def copies(index: Any, back: bool) -> list[Any]:
        row, first = rows[begin + index], pl.multiple_of(offsets[begin + index] // tile * tile, tile)
        places = [target.at[pl.ds(row, heads), pl.ds(first, tile)] for target in targets[:num_pages]]
        places += [target.at[row // heads] for target in targets[num_pages:]]
        pairs = [(place, buffer.at[index]) for place, buffer in zip(places, buffers, strict=True)]
        return [pltpu.make_async_copy(*(pair[::-1] if back else pair), arrived.at[int(back)]) for pair in pairs]

    def of_all(act: Any) -> None:
        def one(index: Any, _: Any) -> Any:
            pl.when(rows[begin + index] >= 0)(functools.partial(act, index))
            return _

        lax.fori_loop(0, chunk, one, 0)

    def put(index: Any) -> None:
        offset = offsets[begin + index]
        place = lax.broadcasted_iota(jnp.int32, (heads, tile, size), 1)
        for part, buffer in zip(new, buffers[:num_pages], strict=True):
            old = buffer[index].astype(jnp.float32)
            found = jnp.where(place == lax.rem(offset, tile), part[index][:, None, :], old)
            buffer[index] = _narrowed(found, buffer.dtype)
        for factor, buffer in zip(factors, buffers[num_pages:], strict=True):
            row = buffer[index]
            lane = lax.broadcasted_iota(jnp.int32, row.shape, 1)
            for head in range(heads):
                row = jnp.where(lane == head * length + offset, factor[(begin + index) * heads + head], row)
            buffer[index] = row
        start(index, back=True)

    def start(index: Any, back: bool = False) -> None:
        for copy in copies(index, back):
            copy.start()

    def wait(index: Any, back: bool = False) -> None:
        for copy in copies(index, back):
            copy.wait()

    of_all(start)
    of_all(wait)
    of_all(put)
    of_all(functools.partial(wait, back=True))


def _narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(jnp.int32).astype(dtype) if dtype == jnp.int8 else x.astype(dtype)
