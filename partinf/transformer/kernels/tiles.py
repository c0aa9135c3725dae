"""The core of attention: softmax over keys that lie in pages, written twice in XLA's terms.

`Tiles` says how: tile by tile with a running softmax, so that neither scores nor gathered context exist as a whole and tiles that no query
may see are skipped; or, without tiles, the plain twin, which gathers everything and masks. Both give the same up to rounding. Trip
counts are static in both. Where a platform has a kernel that reads pages where they lie (`paged_decode` for TPUs, `cpu_kernels` for
CPUs), that does what it fits. Which tiles a platform has stands in its row (`partinf.hardware.platform`).

Letters: B rows, L queries of a row, H query heads in groups of G per key-value head K, Q d_head, S tokens of a page, M keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from partinf.foundation.rounding import ceil_div, round_up
from partinf.hardware.platform import Tiles
from partinf.partition.quantize import Quantized, dequantize
from partinf.transformer import cache
from partinf.transformer.cache import KeysValues, Stored
from partinf.transformer.kernels import choices
from partinf.transformer.kernels import cpu as cpu_kernels
from partinf.transformer.linear import capped, dot

_MASKED = -1e30  # finite, so that a row without any key stays finite
_LEAST = -1e29  # below every score and so far above a masked one that exp of the difference is 0

Read = Callable[[jax.Array], KeysValues]
"""Page ids [B, n] → the context that lies there, [B, K, n·S, Q]."""


class Context(NamedTuple):
    """What earlier steps stored.

    Attributes:
        read: how to read pages. table: their ids [slots, n] for it. slots: the slots' own ids. lengths: how many positions each has there.
        stored: where the same pages lie, if all their heads are read.
        floor: of each query [T], how many of the positions there lie before its window; None without one.
    """

    read: Read
    table: jax.Array
    slots: jax.Array
    lengths: jax.Array
    stored: Stored | None = None
    floor: jax.Array | None = None


class Scores(NamedTuple):
    """How a query scores a key.

    Attributes:
        scale: of q · k; 0 for 1/√Q. cap: c in c·tanh(score/c), 0 for none.
        window: positions that a query sees, the latest ones, its own included; 0 for all.
    """

    scale: float = 0.0
    cap: float = 0.0
    window: int = 0

    def of(self, size: int) -> float:
        """The scale for heads of this size."""
        return self.scale or size**-0.5

    def made(self, products: jax.Array, size: int) -> jax.Array:
        """Scores from q · k, float32."""
        return capped(products * self.of(size), self.cap)


PLAIN = Scores()


class Attended(NamedTuple):
    """Attention over some keys, and what it takes to add that over others.

    Attributes:
        out: [rows, H, Q]. mass: [rows, H] float32, logarithm of the sum of exp(score); very negative for rows that saw no key.
    """

    out: jax.Array
    mass: jax.Array


class Fresh(NamedTuple):
    """Keys and values [K, M, Q] of prompt tokens of this step, the slot of each [M], -1 for padding, and its place in its sequence [M]."""

    new: KeysValues
    owner: jax.Array
    position: jax.Array


class _Running(NamedTuple):
    """A softmax over the keys seen so far: their largest score, the sum of exp(score - largest), and the values weighted by that."""

    top: jax.Array  # [B, K, G, L]
    mass: jax.Array  # [B, K, G, L]
    out: jax.Array  # [B, K, G, L, Q], not yet divided by the mass


def decode(
    q: jax.Array,
    read: Read,
    table: jax.Array,
    position: jax.Array,
    tiles: Tiles | None,
    stored: Stored | None = None,
    scores: Scores = PLAIN,
    first: jax.Array | None = None,
) -> Attended:
    """One query per lane over the lane's own pages.

    Args:
        q: [B, H, Q]. table: [B, n] ids for `read`, in the order of positions. position: [B], the last position in these pages that is
            visible; -1 for none, which gives an output that means nothing but is finite. stored: where the same pages lie, if all their
            heads are read. first: [B], the first that is, where scores have a window; it may be after the last.
    """
    if tiles is None:
        context = dequantized(read(table), q.dtype)
        visible = _between(jnp.arange(context.keys.shape[2]), first, position)
        return _first(attend(q[:, None], context, visible[:, None], scores))
    grouped = _group(q[:, None], jax.eval_shape(read, table[:, :1]).keys.shape[1])
    found = None if stored is None else _in_place(grouped[:, :, :, 0], stored, position, tiles, scores, first)
    if found is not None:
        return Attended(found[0].reshape(q.shape), found[1].reshape(q.shape[:2]))
    if first is not None and _reach(table, read, scores.window) < table.shape[1]:
        table, shift = _within(table, first, read, scores.window)
        position, first = position - shift, first - shift
    columns, size = _columns(table, read, tiles.keys)
    last, least = jnp.max(position), None if first is None else jnp.min(first)

    def tile(running: _Running, inputs: tuple[jax.Array, jax.Array]) -> tuple[_Running, None]:
        ids, start = inputs

        def seen() -> _Running:
            visible = _between(start + jnp.arange(size), first, position)
            return _absorb(running, grouped, read(ids), visible[:, None], scores)

        wanted = last >= start if least is None else (last >= start) & (start + size > least)
        return _maybe(wanted, seen, running, tiles), None

    starts = jnp.arange(columns.shape[0]) * size
    running, _ = lax.scan(tile, _nothing(grouped), (columns, starts))
    return _first(_finish(running, q.dtype))


def _in_place(
    q: jax.Array, stored: Stored, position: jax.Array, tiles: Tiles, scores: Scores, first: jax.Array | None
) -> tuple[jax.Array, jax.Array] | None:
    """`decode` of q [B, K, G, Q] by a kernel that reads pages where they lie; None where there is none for these."""
    if tiles.native and cpu_kernels.fits(stored.pages):
        return cpu_kernels.decode(q, stored, position, scores.of(q.shape[-1]), scores.cap, first, choices.current().of_blocks)
    if tiles.paged:
        from partinf.transformer.kernels import paged_decode  # it takes a quarter of a second, which a CPU never needs

        if paged_decode.fits(stored.pages):
            return paged_decode.paged_decode(
                q, stored.pages, stored.rows, position, scores.of(q.shape[-1]), scores.cap, first, tiles.interpret
            )
    return None


def write(kv: Any, layer: Any, pages: jax.Array, offsets: jax.Array, owned: jax.Array, new: KeysValues, tiles: Tiles | None) -> Any:
    """`cache.write` of one token for each lane, whose pages no other lane writes: where there is a kernel for that the cache stays where it
    lies."""
    if tiles is not None and tiles.paged and not cache.paged_by_heads(kv, layer):
        from partinf.transformer.kernels import paged_decode, paged_write

        lying = cache.stored(kv, layer, pages)
        if paged_decode.fits(lying.pages):
            rows = jnp.where(owned, lying.rows, -1)
            return cache.restored(kv, layer, paged_write.paged_write(lying.pages, rows, offsets, new, tiles.interpret))
    return cache.write(kv, layer, pages, offsets, owned, new)


def prefill(
    q: jax.Array,
    owner: jax.Array,
    position: jax.Array,
    fresh: Fresh,
    context: Context | None,
    tiles: Tiles | None,
    scores: Scores = PLAIN,
) -> Attended:
    """Flat prompt tokens: each sees its own prompt's tokens up to itself, those of this step and those stored before.

    Args:
        q: [T, H, Q]. owner: [T], the slot of each token, -1 for padding. position: [T], its place in its sequence.
        fresh: keys and values of the same tokens, or of those among them that are to be attended to here.
        context: what earlier steps stored of the slots' sequences, if any.
    """
    if tiles is None:
        return _prefill_plain(q, owner, position, fresh, context, scores)
    lying = None if context is None else context.stored
    if tiles.native and (context is None or lying is not None) and cpu_kernels.fits(fresh.new if lying is None else lying.pages):
        earlier = None if context is None or lying is None else (lying, context.slots, context.lengths)
        how = scores.of(q.shape[-1]), scores.cap, scores.window, None if context is None else context.floor
        return Attended(*cpu_kernels.prefill(q, owner, position, *fresh, earlier, *how, choices.current().of_blocks))
    if context is not None and context.floor is not None and _reach(context.table, context.read, scores.window) < context.table.shape[1]:
        context = _latest(context, owner, scores.window)
    new, total, groups = fresh.new, q.shape[0], fresh.new.keys.shape[0]
    done = _by_kernel(q, owner, position, fresh, scores, tiles)
    if done is not None and context is None:
        return done

    def cut(x: jax.Array, length: int, fill: int) -> jax.Array:
        length = min(length, x.shape[0])
        return _pad(x, round_up(x.shape[0], length), fill).reshape(-1, length, *x.shape[1:])

    length = tiles.queries(q.shape[1])
    halves = (
        cut(jnp.swapaxes(x, 0, 1), tiles.prompt_keys, 0).swapaxes(1, 2)[:, None] for x in (new.keys, new.values)
    )  # [tiles, 1, K, M, Q]
    parts = (*halves, cut(fresh.owner, tiles.prompt_keys, -1), cut(fresh.position, tiles.prompt_keys, 0))

    def queries(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, Attended]:
        q, owner, position, begun, *floor = inputs
        grouped = _group(q[None], groups)

        def tile(running: _Running, inputs: tuple[jax.Array, ...]) -> tuple[_Running, None]:
            keys, values, key_owner, key_position = inputs
            visible = _of_prompt(owner, position, key_owner, key_position, scores.window) & (owner[:, None] >= 0)
            seen = lambda: _absorb(running, grouped, KeysValues(keys, values), visible[None], scores)  # noqa: E731
            return _maybe(jnp.any(visible), seen, running, tiles), None

        running = lax.scan(tile, _nothing(grouped), parts)[0] if begun is None else _resumed(begun, groups)
        if context is not None:
            running = _earlier(running, grouped, owner, context, tiles, scores, floor[0] if floor else None)
        found = _finish(running, q.dtype)
        return None, Attended(found.out[0], found.mass[0])

    begun = None if done is None else Attended(cut(done.out, length, 0), cut(done.mass, length, 0))
    floors = () if context is None or context.floor is None else (cut(context.floor, length, 0),)
    _, found = lax.scan(queries, None, (cut(q, length, 0), cut(owner, length, -1), cut(position, length, 0), begun, *floors))
    return Attended(*(x.reshape(-1, *x.shape[2:])[:total] for x in found))


def _reach(table: jax.Array, read: Read, window: int) -> int:
    """How many of the pages of a row [B, n] a window can reach."""
    size = jax.eval_shape(read, table[:, :1]).keys.shape[-2]
    return min(table.shape[1], ceil_div(window - 1, size) + 1)


def _within(table: jax.Array, first: jax.Array, read: Read, window: int) -> tuple[jax.Array, jax.Array]:
    """The pages of each row [B, n] that a window from `first` [B] on can reach, and how many positions [B] lie before them."""
    size, count = jax.eval_shape(read, table[:, :1]).keys.shape[-2], _reach(table, read, window)
    start = jnp.clip(first // size, 0, table.shape[1] - count)
    return jnp.take_along_axis(table, start[:, None] + jnp.arange(count)[None, :], axis=1), start * size


def _latest(context: Context, owner: jax.Array, window: int) -> Context:
    """The context with no pages but those that the windows of queries of these owners [T] can reach."""
    assert context.floor is not None
    mine = owner[:, None] == context.slots[None, :]  # [T, slots]
    first = jnp.min(jnp.where(mine, context.floor[:, None], jnp.iinfo(jnp.int32).max), axis=0)
    table, shift = _within(context.table, first, context.read, window)
    floor = context.floor - jnp.sum(jnp.where(mine, shift[None, :], 0), axis=1)
    return context._replace(table=table, lengths=context.lengths - shift, stored=None, floor=floor)


def _by_kernel(q: jax.Array, owner: jax.Array, position: jax.Array, fresh: Fresh, scores: Scores, tiles: Tiles) -> Attended | None:
    """Attention over the fresh keys alone by the TPU's kernel, where it fits."""
    if not tiles.takes_prompts(q.shape[1], fresh.new.keys.shape[0], q.shape[-1]):
        return None
    from partinf.transformer.kernels import prompt  # as in `_in_place`

    how = scores.of(q.shape[-1]), scores.cap, scores.window, tiles.interpret
    return Attended(*prompt.prompt_attention(q, owner, position, fresh.new.keys, fresh.new.values, fresh.owner, fresh.position, *how))


def _resumed(found: Attended, groups: int) -> _Running:
    """The running softmax over keys that were attended to already: out [L, H, Q], mass [L, H]."""
    mass = _group(found.mass[None, :, :, None], groups)[..., 0]
    return _Running(mass, jnp.ones_like(mass), _group(found.out[None].astype(jnp.float32), groups))


def _earlier(
    running: _Running, grouped: jax.Array, owner: jax.Array, context: Context, tiles: Tiles, scores: Scores, floor: jax.Array | None
) -> _Running:
    """Add to a tile of queries what its slots stored before this step; `floor` is theirs."""
    read, table, slots, lengths = context[:4]
    columns, size = _columns(table, read, tiles.prompt_keys)
    first = jnp.arange(columns.shape[0]) * size

    def slot(running: _Running, inputs: tuple[jax.Array, ...]) -> tuple[_Running, None]:
        columns, slot, start = inputs
        mine = owner == slot
        least = None if floor is None else jnp.min(jnp.where(mine, floor, jnp.iinfo(jnp.int32).max))

        def tile(running: _Running, inputs: tuple[jax.Array, jax.Array]) -> tuple[_Running, None]:
            ids, begin = inputs
            place = begin + jnp.arange(size)
            visible = mine[:, None] & (place < start)[None, :]
            if floor is not None:
                visible &= place[None, :] >= floor[:, None]
            seen = lambda: _absorb(running, grouped, read(ids[None]), visible[None], scores)  # noqa: E731
            wanted = begin < start if least is None else (begin < start) & (begin + size > least)
            return _maybe(wanted, seen, running, tiles), None

        over_pages = lambda: lax.scan(tile, running, (columns, first))[0]  # noqa: E731
        return _maybe(jnp.any(mine) & (start > 0), over_pages, running, tiles), None

    return lax.scan(slot, running, (jnp.swapaxes(columns, 0, 1), slots, lengths))[0]


def _prefill_plain(q: jax.Array, owner: jax.Array, position: jax.Array, fresh: Fresh, context: Context | None, scores: Scores) -> Attended:
    (keys, values), key_owner, key_position = (fresh.new.keys, fresh.new.values), fresh.owner, fresh.position
    if context is not None:
        read, table, slots, lengths = context[:4]
        found = dequantized(read(table), q.dtype)  # [slots, K, M, Q]
        count, groups, length, size = found.keys.shape
        flat = lambda x: jnp.swapaxes(x, 0, 1).reshape(groups, count * length, size)  # noqa: E731
        keys, values = (jnp.concatenate([flat(x), y], axis=1) for x, y in ((found.keys, keys), (found.values, values)))
        inside = jnp.arange(length)[None, :] < lengths[:, None]
        key_owner = jnp.concatenate([jnp.where(inside, slots[:, None], -2).reshape(-1), key_owner])
        # All that a slot stored comes before any of its tokens here: -1 stands for that.
        key_position = jnp.concatenate([jnp.full(count * length, -1), key_position])
    visible = _of_prompt(owner, position, key_owner, key_position, scores.window)
    if context is not None and context.floor is not None:
        earlier = jnp.tile(jnp.arange(length), count)[None, :] >= context.floor[:, None]
        stored = (owner[:, None] == key_owner[None, : count * length]) & earlier
        visible = jnp.concatenate([stored, visible[:, count * length :]], axis=1)
    found = attend(q[None], KeysValues(keys[None], values[None]), visible[None], scores)
    return Attended(found.out[0], found.mass[0])


def _of_prompt(owner: jax.Array, position: jax.Array, key_owner: jax.Array, key_position: jax.Array, window: int) -> jax.Array:
    """Which keys [M] of prompts the queries [T] see: those of the same owner up to their own position, and none before their window."""
    visible = (owner[:, None] == key_owner[None, :]) & (key_position[None, :] <= position[:, None])
    return visible & (key_position[None, :] > position[:, None] - window) if window else visible


def _between(place: jax.Array, first: jax.Array | None, last: jax.Array) -> jax.Array:
    """Which places [M] lie between the first and the last of each row [B]; from the start on where there is no first."""
    visible = place[None, :] <= last[:, None]
    return visible if first is None else visible & (place[None, :] >= first[:, None])


def attend(q: jax.Array, context: KeysValues, visible: jax.Array, how: Scores = PLAIN) -> Attended:
    """Softmax attention of q [B, L, H, Q] over context [B, K, M, Q] where visible [B, L, M]; query head i reads kv head i // G.

    The plain form: scores in float32, everything materialised.
    """
    grouped = _group(q, context.keys.shape[1])
    products = jnp.einsum("bkglq,bkmq->bkglm", grouped, context.keys, preferred_element_type=jnp.float32)
    scores = how.made(products, q.shape[-1])
    scores = jnp.where(visible[:, None, None], scores, _MASKED)
    probs, mass = jax.nn.softmax(scores, axis=-1).astype(q.dtype), jax.nn.logsumexp(scores, axis=-1)
    return Attended(_ungroup(dot("bkglm,bkmq->bkglq", probs, context.values)), _ungroup(mass[..., None])[..., 0])


def _absorb(running: _Running, q: jax.Array, tile: KeysValues, visible: jax.Array, how: Scores) -> _Running:
    """The running softmax with one more tile [B, K, M, Q]; q [B, K, G, L, Q], visible [B, L, M]. int8 is scaled after its product."""
    keys, key_scale = _parts(tile.keys, q.dtype)
    values, value_scale = _parts(tile.values, q.dtype)
    products = jnp.einsum("bkglq,bkmq->bkglm", q, keys, preferred_element_type=jnp.float32)
    if key_scale is not None:
        products = products * key_scale[:, :, None, None, :]
    scores = how.made(products, q.shape[-1])
    scores = jnp.where(visible[:, None, None], scores, _MASKED)
    top = jnp.maximum(running.top, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - top[..., None])  # 0 where masked: `top` is at least _LEAST
    fade = jnp.exp(running.top - top)
    mass = running.mass * fade + jnp.sum(weights, axis=-1)
    if value_scale is not None:
        weights = weights * value_scale[:, :, None, None, :]
    added = jnp.einsum("bkglm,bkmq->bkglq", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
    return _Running(top, mass, running.out * fade[..., None] + added)


def _nothing(grouped: jax.Array) -> _Running:
    zero = jnp.zeros(grouped.shape[:-1], jnp.float32)
    return _Running(zero + _LEAST, zero, jnp.zeros(grouped.shape, jnp.float32))


def _finish(running: _Running, dtype: Any) -> Attended:
    """[B, L, H, Q] and [B, L, H]; rows that saw nothing are 0."""
    mass = jnp.maximum(running.mass, jnp.finfo(jnp.float32).tiny)
    out, log_mass = running.out / mass[..., None], running.top + jnp.log(mass)
    return Attended(_ungroup(out).astype(dtype), _ungroup(log_mass[..., None])[..., 0])


def _first(found: Attended) -> Attended:
    """The only query of every row: [B, 1, H, Q] → [B, H, Q]."""
    return Attended(found.out[:, 0], found.mass[:, 0])


def _maybe(wanted: jax.Array, work: Callable[[], _Running], otherwise: _Running, tiles: Tiles) -> _Running:
    return lax.cond(wanted, work, lambda: otherwise) if tiles.skip else work()


def _group(q: jax.Array, groups: int) -> jax.Array:
    """[B, L, H, Q] → [B, K, G, L, Q]."""
    rows, length, heads, size = q.shape
    return q.reshape(rows, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)


def _ungroup(out: jax.Array) -> jax.Array:
    """[B, K, G, L, Q] → [B, L, H, Q]."""
    rows, groups, each, length, size = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, groups * each, size)


def _columns(table: jax.Array, read: Read, keys: int) -> tuple[jax.Array, int]:
    """The page table cut into tiles: ids [tiles, B, pages of a tile], and the keys of one; the last tile is filled with page -1."""
    size = jax.eval_shape(read, table[:, :1]).keys.shape[-2]
    pages = min(max(1, keys // size), table.shape[1])
    padded = _pad(table.T, round_up(table.shape[1], pages), -1).T
    return jnp.swapaxes(padded.reshape(table.shape[0], -1, pages), 0, 1), pages * size


def dequantized(context: KeysValues, dtype: Any) -> KeysValues:
    """The same as plain arrays of `dtype`."""
    plain = lambda x: dequantize(x, dtype) if isinstance(x, Quantized) else x.astype(dtype)  # noqa: E731
    return KeysValues(plain(context.keys), plain(context.values))


def _parts(array: Any, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    return (array.values.astype(dtype), array.scale) if isinstance(array, Quantized) else (array.astype(dtype), None)


def _pad(x: jax.Array, length: int, fill: int) -> jax.Array:
    return jnp.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
