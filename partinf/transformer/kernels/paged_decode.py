"""One query per lane over the lane's pages, as a kernel for TPUs: pages travel from HBM as they lie, while those before are multiplied.

XLA has no such form: it gathers the pages of a tile into an array of its own, writes that, and reads it again. Here blocks of pages are
fetched page by page into one of two buffers while the other is worked on; the first block of a lane is fetched behind the last one of the
lane before. Pages after a lane's position are not touched. int8 pages are widened on the chip; the scales of a page, those of all its heads
in one row, scale scores and weights.

Where keys and values lie side by side, one row has both: queries are filled up with zeros, which leave values out of the scores, and of
what the weights add up the part behind the keys is the output.

Letters: B lanes, K key-value heads, G query heads of each, Q d_head, S tokens of a page, n pages of a table.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from partinf.foundation.rounding import ceil_div
from partinf.hardware.platform import LANES
from partinf.partition.quantize import Quantized
from partinf.transformer.cache import JoinedKeysValues, KeysValues

_MASKED, _LEAST = -1e30, -1e29  # as in `partinf.transformer.kernels.tiles`
_BUFFERS = 4 << 20  # bytes of on-chip memory for pages
_MOST_KEYS = 512  # of one block
_SUBLANES = 32  # bytes of a tile's column: what a page has to fill so that pages stand side by side without gaps
_INT8_TOKENS = 16  # the same for int8, of which eight rows fill a tile; what is widened fills its own then
# Most bytes in the kernel's cost estimate, 10 us on a v5e: about what a call takes besides its bytes. Behind what it believes to take
# long it fetches weights, and behind these bytes they would only share HBM with the pages.
_COVER = 8 << 20


def fits(pages: KeysValues | JoinedKeysValues) -> bool:
    """Whether the kernel takes these pages [.., S, Q]: those that fill their tiles; of int8, with scales in rows of whole lanes."""
    arrays, scales = apart(pages)
    size = arrays[0].shape[-2]
    if scales:
        return size % _INT8_TOKENS == 0 and LANES % size == 0 and scales[0].shape[-1] % LANES == 0
    return size * arrays[0].dtype.itemsize % _SUBLANES == 0


def apart(pages: KeysValues | JoinedKeysValues) -> tuple[list[Any], list[Any]]:
    """The arrays of pages, keys and values or one of both, and their scales if they have any."""
    if isinstance(pages, JoinedKeysValues):
        return [pages.both], list(pages.scales)
    halves = (pages.keys, pages.values)
    arrays = [half.values if isinstance(half, Quantized) else half for half in halves]
    return arrays, [half.scale for half in halves if isinstance(half, Quantized)]


def paged_decode(
    q: jax.Array,
    pages: KeysValues | JoinedKeysValues,
    rows: jax.Array,
    position: jax.Array,
    scale: float,
    cap: float = 0.0,
    least: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query per lane.

    Args:
        q: [B, K, G, Q]. pages: [R, S, Q], or [R, S, 2Q] of both, the heads of a page one after the other, of which K are read; scales
            [R / heads, 1, lanes].
        rows: [B, n], where each page of a lane begins in `pages`; any row for those that the lane does not have. position: [B], the last
            that is visible, -1 for none. scale: of scores. cap: c in c·tanh(score/c), 0 for none.
        least: [B], the first that is visible; None for the first that there is.
        interpret: run without a TPU.

    Returns:
        [B, K, G, Q], and the logarithm of the sum of exp(score) [B, K, G], float32.
    """
    lanes, kv_heads, group, head_dim = q.shape
    arrays, scales = apart(pages)
    held, (length, size) = rows.shape[1], arrays[0].shape[1:]
    q = jnp.pad(q, [(0, 0)] * 3 + [(0, size - head_dim)]) if size > head_dim else q
    itemsize = arrays[0].dtype.itemsize
    each = max(1, min(held, min(_MOST_KEYS, _BUFFERS // (2 * len(arrays) * kv_heads * max(size, LANES) * itemsize)) // length))
    buffers = [pltpu.VMEM((2, each, kv_heads, length, size), array.dtype) for array in arrays]
    buffers += [pltpu.VMEM((2, each, 1, scale.shape[-1]), scale.dtype) for scale in scales]
    lane = lambda lane, *_: (lane, 0, 0, 0)  # noqa: E731
    visible = (position,) if least is None else (position, least)
    out, mass = pl.pallas_call(
        functools.partial(
            _kernel,
            scale=scale,
            cap=cap,
            windows=least is not None,
            lanes=lanes,
            held=held,
            each=each,
            num_pages=len(arrays),
            num_scales=len(scales),
        ),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((lanes, kv_heads, group, 1), jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(visible),
            grid=(lanes,),
            in_specs=[pl.BlockSpec((1, kv_heads, group, size), lane)] + [pl.BlockSpec(memory_space=pl.ANY)] * len(buffers),
            out_specs=(pl.BlockSpec((1, kv_heads, group, size), lane), pl.BlockSpec((1, kv_heads, group, 1), lane)),
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32)],
        ),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=min(_COVER, len(arrays) * lanes * held * length * kv_heads * size * itemsize)
        ),
        interpret=interpret,
        name="paged_decode",
    )(rows.reshape(-1), *visible, q, *arrays, *scales)
    return out[..., size - head_dim :], mass[..., 0]


def _kernel(
    rows: Any,
    position: Any,
    *others: Any,
    scale: float,
    cap: float,
    windows: bool,
    lanes: int,
    held: int,
    each: int,
    num_pages: int,
    num_scales: int,
) -> None:
    """One lane. `others`: the first visible positions where there are windows; queries; keys and values, or both in one, and their scales
    if they have any; the two results; a pair of buffers for each of the former, their semaphores, and which buffer is next."""
    least, q, *others = others if windows else (None, *others)  # type: ignore[assignment]
    num_sources = num_pages + num_scales
    sources, (out, mass), (*buffers, arrived, turn) = others[:num_sources], others[num_sources : num_sources + 2], others[num_sources + 2 :]
    lane = pl.program_id(0)
    _, kv_heads, group, size = q.shape
    length = sources[0].shape[1]
    of_page = sources[0].shape[0] // sources[-1].shape[0]  # heads whose scales stand in one row

    def blocks(lane: Any) -> Any:
        return jnp.maximum((position[lane] + each * length) // (each * length), 1)

    def begin(lane: Any) -> Any:
        return 0 if least is None else jnp.minimum(least[lane] // (each * length), blocks(lane) - 1)

    def copies(lane: Any, block: Any, buffer: Any) -> list[Any]:
        found = []
        for page in range(each):
            row = rows[lane * held + jnp.minimum(block * each + page, held - 1)]
            for source, target in zip(sources[:num_pages], buffers[:num_pages], strict=True):
                found.append(pltpu.make_async_copy(source.at[pl.ds(row, kv_heads)], target.at[buffer, page], arrived.at[buffer]))
            for source, target in zip(sources[num_pages:], buffers[num_pages:], strict=True):
                found.append(pltpu.make_async_copy(source.at[row // of_page], target.at[buffer, page], arrived.at[buffer]))
        return found

    def fetch(lane: Any, block: Any, buffer: Any) -> None:
        for copy in copies(lane, block, buffer):
            copy.start()

    @pl.when(lane == 0)
    def _first() -> None:
        turn[0] = 0
        fetch(0, begin(0), 0)

    last, first, count, start = position[lane], begin(lane), blocks(lane), turn[0]

    def block_of(block: Any, running: Any) -> Any:
        buffer = lax.rem(start + block - first, 2)

        @pl.when(block + 1 < count)
        def _more() -> None:
            fetch(lane, block + 1, 1 - buffer)

        @pl.when((block + 1 == count) & (lane + 1 < lanes))
        def _ahead() -> None:
            fetch(lane + 1, begin(lane + 1), 1 - buffer)

        for copy in copies(lane, block, buffer):
            copy.wait()
        place = block * each * length + lax.broadcasted_iota(jnp.int32, (1, each * length), 1)
        updated = []
        visible = place <= last if least is None else (place <= last) & (place >= least[lane])
        front = lax.rem(rows[lane * held], of_page) if of_page > 1 else 0  # of the heads that are read
        for head, (top, total, added) in enumerate(running):
            read = [pages[buffer, :, head].astype(q.dtype).reshape(each * length, size) for pages in buffers[:num_pages]]
            k, v = read[0], read[-1]
            scales = [_in_line(scale[buffer, :, 0], (front + head) * length, length) for scale in buffers[num_pages:]]
            scores = lax.dot_general(q[0, head], k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
            scores = scores * scales[0] if scales else scores
            scores = jnp.where(visible, cap * jnp.tanh(scores / cap) if cap else scores, _MASKED)
            highest = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, fade = jnp.exp(scores - highest), jnp.exp(top - highest)
            sums = total * fade + jnp.sum(weights, axis=-1, keepdims=True)
            weights = weights * scales[1] if scales else weights
            product = lax.dot_general(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            updated.append((highest, sums, added * fade + product))
        return tuple(updated)

    column = jnp.zeros((group, 1), jnp.float32)
    nothing = (column + _LEAST, column, jnp.zeros((group, size), jnp.float32))
    running = lax.fori_loop(first, count, block_of, (nothing,) * kv_heads)
    turn[0] = lax.rem(start + count - first, 2)
    for head, (top, total, added) in enumerate(running):
        kept = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        out[0, head] = (added / kept).astype(out.dtype)
        mass[0, head] = top + jnp.log(kept)


def _in_line(rows: jax.Array, start: Any, length: int) -> jax.Array:
    """Numbers start … start + length of every row [n, lanes], one row after the other: [1, n · length]. They are first brought to the front
    and repeated over the lanes, so that those of row i stand, among others, where they are wanted: from there each row gives its own."""
    count = rows.shape[0]
    parts = [rows[:, at : at + LANES] for at in range(0, rows.shape[1], LANES)]
    if len(parts) > 1:
        part = start // LANES
        parts = [sum(jnp.where(part == at, x, 0.0) for at, x in enumerate(parts))]
    lane = lax.broadcasted_iota(jnp.int32, (count, LANES), 1)
    found = pltpu.roll(parts[0], lax.rem(LANES - lax.rem(start, LANES), LANES), 1)
    found = jnp.where(lane < length, found, 0.0)
    reach = length
    while reach < LANES:
        found, reach = found + pltpu.roll(found, reach, 1), 2 * reach
    found = jnp.concatenate([found] * ceil_div(count * length, LANES), axis=1)[:, : count * length]
    place = lax.broadcasted_iota(jnp.int32, found.shape, 1) // length
    own = place == lax.broadcasted_iota(jnp.int32, found.shape, 0)
    return jnp.sum(jnp.where(own, found, 0.0), axis=0, keepdims=True)
