"""The paged KV cache on the devices: its declaration, and reading and writing pages.

One layout for all phases, that of decode's attention: pages lie on the shard of the batch axes that owns the request, where the sequence
axes split them, and key-value heads are split over the leading head axes as far as they divide. Keys and values lie apart, each
[P.bs, K.k, S, Q] per layer, so that the keys of a head are a matrix [S, Q] in every page, or side by side, [P.bs, K.k, S, 2Q], where only
both fill whole lanes (`Platform.joins_keys_and_values`); either one pair per layer or all layers of a
group (`Plan.cache_groups`) stacked on a leading dimension (behind `write` and `read`). Every group has as many pages as it needs. Scales of
int8 lie apart too, [P.bs, ways of k, heads of one device · S], filled up to whole lanes where the platform has such (`Platform.lanes`):
those of a page are one run on a device, which is written, read and fetched as it lies. A TPU shown S numbers per head stored them in
tiles of 128, eight times as many bytes, and laid them out anew in every layer. Page ids are global within a group,
shard · pages_per_shard + part · pages of a part + local id,
and page i of a sequence lies in part i modulo their number; -1 is no page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from partinf.foundation.rounding import round_up
from partinf.partition.quantize import Quantized, quantize
from partinf.partition.sharding import sharding
from partinf.plans import CacheGroup, Plan
from partinf.workload import DType

_LETTERS = "PC.."


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeysValues:
    """Keys and values of one shape, arrays or `Quantized` ones."""

    keys: Any
    values: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagesOfHeads(KeysValues):
    """A cache that is indexed page by page and head by head: a compiler that partitions the program itself sees that its shards are pages,
    which it cannot see in the rows that `write` and `read` use otherwise. Single layers have no such view."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JoinedKeysValues:
    """Keys and values of a head side by side: [.., S, 2Q], and the scales of both where they are int8."""

    both: Any
    scales: tuple[Any, ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JoinedPagesOfHeads(JoinedKeysValues):
    """The same for `PagesOfHeads`."""


_OF_HEADS = (PagesOfHeads, JoinedPagesOfHeads)


def by_heads(kv: Any) -> Any:
    """A stack of layers as a compiler is to see it that partitions the program itself."""
    return JoinedPagesOfHeads(kv.both, kv.scales) if isinstance(kv, JoinedKeysValues) else PagesOfHeads(kv.keys, kv.values)


def not_by_heads(kv: Any) -> Any:
    """What `by_heads` was given."""
    return JoinedKeysValues(kv.both, kv.scales) if isinstance(kv, JoinedKeysValues) else KeysValues(kv.keys, kv.values)


def abstract_cache(plan: Plan, mesh: Mesh | AbstractMesh, unrolled: bool) -> Any:
    """The cache as `jax.ShapeDtypeStruct`s with shardings, group by group: a tuple of layers where they lie apart, or one stack of them.
    int8 has a scale per token and head."""
    return tuple(_abstract_group(plan, mesh, unrolled, group) for group in plan.cache_groups)


def _abstract_group(plan: Plan, mesh: Mesh | AbstractMesh, unrolled: bool, group: CacheGroup) -> Any:
    model, lead = plan.padded_model, () if unrolled else (len(group.layers),)
    joined = plan.slice.chip.platform.joins_keys_and_values(model.head_dim)
    shape = (group.pages_per_shard * plan.num_shards, model.num_kv_heads, plan.cache.page_size, (1 + joined) * model.head_dim)

    def array(shape: tuple[int, ...], dtype: Any, letters: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(lead + shape, dtype, sharding=sharding(plan, mesh, "N" * len(lead) + letters))

    if plan.kv is DType.INT8:
        ways, row = _scale_row(plan)
        scale = array((shape[0], ways, row), jnp.float32, _LETTERS[:-1])
        values = array(shape, jnp.int8, _LETTERS)
        half: Any = Quantized(values, scale, (-1,))
        layer: Any = JoinedKeysValues(values, (scale, scale)) if joined else KeysValues(half, half)
    else:
        half = array(shape, jnp.float32 if plan.kv is DType.F32 else _bfloat16(plan), _LETTERS)
        layer = JoinedKeysValues(half) if joined else KeysValues(half, half)
    return (layer,) * len(group.layers) if unrolled else layer


def _scale_row(plan: Plan) -> tuple[int, int]:
    """Over how many devices the scales of a page are split, and how many each of them has room for."""
    ways = plan.ways(plan.letter_axes["C"])
    return ways, round_up(plan.padded_model.num_kv_heads // ways * plan.cache.page_size, plan.slice.chip.platform.lanes)


def _bfloat16(plan: Plan) -> Any:
    """How bfloat16 is stored: as it is, or as its bits."""
    return jnp.uint16 if plan.slice.chip.platform.bfloat16_as_bits else jnp.bfloat16


def cache_bytes_per_device(plan: Plan) -> int:
    """Bytes of the cache that one device holds."""
    model, axes = plan.padded_model, plan.letter_axes["C"]
    heads = model.num_kv_heads // plan.ways(axes)
    of_page = heads * plan.cache.page_size * model.head_dim * plan.kv.num_bytes + (4 * _scale_row(plan)[1] if plan.kv is DType.INT8 else 0)
    pages = sum(len(group.layers) // plan.num_stages * (group.pages_per_shard // plan.num_sequence_shards) for group in plan.cache_groups)
    return pages * 2 * of_page


def local_pages(pages: jax.Array, plan: Plan, group: CacheGroup) -> tuple[jax.Array, jax.Array]:
    """Global page ids of a group as ids on this device, and which of them it has."""
    held, place = group.pages_per_shard // plan.num_sequence_shards, lax.axis_index(plan.page_axes) if plan.page_axes else 0
    local = pages - place * held
    return local, (pages >= 0) & (local >= 0) & (local < held)


def write(kv: Any, layer: Any, pages: jax.Array, offsets: jax.Array, owned: jax.Array, new: KeysValues) -> Any:
    """Store new keys and values [T, K, Q] at (pages [T], offsets [T]) of a layer where `owned`; the rest is dropped."""
    held, number, lead = _held(kv, layer)
    nowhere = jnp.iinfo(jnp.int32).max  # out of range: dropped

    def put(array: jax.Array, part: jax.Array) -> jax.Array:
        if isinstance(held, _OF_HEADS):
            slots = jnp.where(owned, pages, nowhere)
            return array.at[number, slots, :, offsets].set(_as_stored(part, array.dtype), mode="drop")
        rows = _heads_of(array, lead, number, pages) * array.shape[lead + 2] + offsets[:, None]  # [T, K]
        flat = array.reshape(-1, array.shape[-1])
        return flat.at[jnp.where(owned[:, None], rows, nowhere)].set(_as_stored(part, array.dtype), mode="drop").reshape(array.shape)

    def put_scale(scale: jax.Array, part: jax.Array, heads: int, size: int) -> jax.Array:
        together = heads // scale.shape[lead + 1]
        head = jnp.arange(heads)[None]
        group, place = head // together, head % together * size + offsets[:, None]  # [1, K], [T, K]
        if isinstance(held, _OF_HEADS):
            return scale.at[number, jnp.where(owned, pages, nowhere)[:, None], group, place].set(part, mode="drop")
        rows = ((number * scale.shape[lead] + pages)[:, None] * scale.shape[lead + 1] + group) * scale.shape[-1] + place
        return scale.reshape(-1).at[jnp.where(owned[:, None], rows, nowhere)].set(part, mode="drop").reshape(scale.shape)

    def put_half(half: Any, part: jax.Array) -> Any:
        if not isinstance(half, Quantized):
            return put(half, part)
        levels, (heads, size) = quantize(part, (-1,)), half.shape[lead + 1 : lead + 3]
        return Quantized(put(half.values, levels.values), put_scale(half.scale, levels.scale, heads, size), half.contracted)

    def put_both(held: JoinedKeysValues) -> JoinedKeysValues:
        levels, (heads, size) = joined(held, new), held.both.shape[lead + 1 : lead + 3]
        scales = (put_scale(scale, part, heads, size) for scale, part in zip(held.scales, levels.scales, strict=True))
        return type(held)(put(held.both, levels.both), tuple(scales))

    if isinstance(held, JoinedKeysValues):
        updated: Any = put_both(held)
    else:
        updated = type(held)(put_half(held.keys, new.keys), put_half(held.values, new.values))
    return (*kv[:layer], updated, *kv[layer + 1 :]) if isinstance(kv, tuple) else updated


def joined(held: JoinedKeysValues, new: KeysValues) -> JoinedKeysValues:
    """New keys and values [.., Q] side by side, in int8 with their scales where the cache is."""
    if not held.scales:
        return JoinedKeysValues(jnp.concatenate([new.keys, new.values], axis=-1))
    levels = [quantize(part, (-1,)) for part in (new.keys, new.values)]
    return JoinedKeysValues(jnp.concatenate([one.values for one in levels], axis=-1), tuple(one.scale for one in levels))


def read(kv: Any, layer: Any, pages: jax.Array) -> KeysValues:
    """The context in pages [B, n] of a layer, as stored: [B, K, n·S, Q]. Ids must be local; those out of range read some page."""
    joined = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    found = _read(kv, layer, pages, joined)  # [B, K, n, S, Q]
    return jax.tree.map(lambda x: x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:]), found)


def read_pages(kv: Any, layer: Any, pages: jax.Array) -> KeysValues:
    """Pages [..] of a layer one by one, as stored: [.., K, S, Q]; see `read`."""
    return _read(kv, layer, pages, lambda x: x)


class Stored(NamedTuple):
    """Pages where they lie, for who reads them in place.

    Attributes:
        pages: all that a device holds, as [R, S, Q] or [R, S, 2Q]: the heads of a page one after the other; scales as rows [.., 1, lanes]
            of all heads of a page together. rows: where each requested page begins.
    """

    pages: KeysValues | JoinedKeysValues
    rows: jax.Array


def stored(kv: Any, layer: Any, pages: jax.Array, head: jax.Array | int = 0) -> Stored:
    """Pages [..] of a layer from this head on, nothing read. Ids must be local; those out of range are some page."""
    held, number, lead = _held(kv, layer)
    count, heads = jax.tree.leaves(held)[0].shape[lead : lead + 2]
    rows = (number * count + jnp.clip(pages, 0, count - 1)) * heads + head

    in_rows = lambda scale: scale.reshape(-1, 1, scale.shape[-1])  # noqa: E731

    def flat(half: Any) -> Any:
        if not isinstance(half, Quantized):
            return half.reshape(-1, *half.shape[lead + 2 :])
        return Quantized(flat(half.values), in_rows(half.scale), half.contracted)

    if isinstance(held, JoinedKeysValues):
        return Stored(type(held)(flat(held.both), tuple(map(in_rows, held.scales))), rows)
    return Stored(type(held)(flat(held.keys), flat(held.values)), rows)


def restored(kv: Any, layer: Any, pages: KeysValues | JoinedKeysValues) -> Any:
    """The cache with the arrays of `Stored.pages`, changed."""
    held, _, _ = _held(kv, layer)
    updated = jax.tree.map(lambda old, new: new.reshape(old.shape), held, pages)
    return (*kv[:layer], updated, *kv[layer + 1 :]) if isinstance(kv, tuple) else updated


def paged_by_heads(kv: Any, layer: Any) -> bool:
    """Whether a compiler that partitions the program itself sees this cache."""
    return isinstance(_held(kv, layer)[0], _OF_HEADS)


def _read(kv: Any, layer: Any, pages: jax.Array, order: Callable[[jax.Array], jax.Array]) -> KeysValues:
    held, number, lead = _held(kv, layer)

    def take(array: jax.Array) -> jax.Array:
        if isinstance(held, _OF_HEADS):
            return order(_as_read(array.at[number, pages].get(mode="clip")))
        heads = order(_heads_of(array, lead, number, pages))
        return _as_read(array.reshape(-1, *array.shape[lead + 2 :]).at[heads].get(mode="clip"))

    def take_scale(scale: jax.Array, heads: int, size: int) -> jax.Array:
        count, ways, row = scale.shape[lead:]
        if isinstance(held, _OF_HEADS):
            found = scale.at[number, pages].get(mode="clip")
        else:
            found = scale.reshape(-1, ways, row).at[number * count + pages].get(mode="clip")  # [.., ways, row]
        return order(found[..., : heads // ways * size].reshape(*pages.shape, heads, size))

    def take_half(half: Any) -> Any:
        if not isinstance(half, Quantized):
            return take(half)
        return Quantized(take(half.values), take_scale(half.scale, *half.shape[lead + 1 : lead + 3]), half.contracted)

    if isinstance(held, JoinedKeysValues):
        halves = jnp.split(take(held.both), 2, axis=-1)
        if held.scales:
            scales = [take_scale(scale, *held.both.shape[lead + 1 : lead + 3]) for scale in held.scales]
            return KeysValues(*(Quantized(half, scale, (-1,)) for half, scale in zip(halves, scales, strict=True)))
        return KeysValues(*halves)
    return KeysValues(take_half(held.keys), take_half(held.values))


def _held(kv: Any, layer: Any) -> tuple[KeysValues | JoinedKeysValues, Any, int]:
    """The arrays that hold a layer, which of their layers it is, and the number of dimensions before their pages."""
    return (kv[layer], 0, 0) if isinstance(kv, tuple) else (kv, layer, 1)


def _heads_of(array: jax.Array, lead: int, layer: Any, pages: jax.Array) -> jax.Array:
    """The heads of a layer's pages [..] as rows [.., K] of the array seen as [layers · P · K, S, Q].

    Reading and writing share this view. A compiler that is shown a head as a dimension between page and token keeps the cache in two
    layouts, one for each; a TPU's copied all of it twice per layer where a device has more than one head.
    """
    count, heads = array.shape[lead : lead + 2]
    head = lax.broadcasted_iota(jnp.int32, (*pages.shape, heads), pages.ndim)
    return (layer * count + pages)[..., None] * heads + head


def _as_stored(new: jax.Array, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(new.astype(jnp.bfloat16), dtype) if dtype == jnp.uint16 else new.astype(dtype)


def _as_read(found: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(found, jnp.bfloat16) if found.dtype == jnp.uint16 else found
