"""Entries of the attention sublayer: projections of all tokens, then per token group the way to its attention state, the core, and back.

Queries are [T.t, H.f, Q] {e unreduced} after their projection; keys and values [T.t, 2, K.kv, Q] {e unreduced}. The decode group attends
from pages on the owner's shard of the batch axes; prompt tokens attend to their own chunk and to earlier context, and their new keys and
values go on to the owners of the pages. Over sequence axes every device attends to its part of the keys; what it found is weighted by its
part of the mass and summed on the way back.
"""

from __future__ import annotations

from partinf.cost.ffn import mean_seconds
from partinf.cost.items import (
    DECODE,
    EARLIER,
    HEADS_AFTER_Q,
    HEADS_BEFORE_O,
    HEADS_NORM,
    NEW_TO_CACHE,
    PREFILL,
    SMALL,
    W_IN,
    W_KV,
    W_O,
    W_OUT,
    W_Q,
    GroupItems,
)
from partinf.cost.ledger import Entry, EntryKind, Op, Part
from partinf.cost.linear import Weight, gather_embed, movement, norm, norm_after, norm_collective, product_seconds, scatter_embed
from partinf.cost.movement import Axes, Group, Split
from partinf.cost.overlap import behind
from partinf.cost.split import StepSplit
from partinf.foundation.paging import PAGE_SIZE
from partinf.foundation.rounding import ceil_div, round_up
from partinf.hardware.platform import TILE_COLUMN
from partinf.model.kinds import QkNorm

_PART = Part.ATTENTION
_F32 = 4
_TO_CACHE = (Op.ALL_TO_ALL, Op.ALL_GATHER)  # nothing of the layer waits for what goes to the cache


def projection_weights(split: StepSplit) -> tuple[Weight, Weight, Weight]:
    """W_Q, W_KV (keys and values stored together) and W_O."""
    model = split.model
    return (
        Weight(split, W_Q, model.num_heads * model.head_dim, split.f_stored, split.f),
        Weight(split, W_KV, 2 * model.num_kv_heads * model.head_dim, split.kv_stored, split.kv),
        Weight(split, W_O, model.num_heads * model.head_dim, split.f_stored, split.f, to_embed=True),
    )


def linear_entries(split: StepSplit) -> list[Entry]:
    """What the sublayer does for all tokens of the step; it depends on storage and gathered axes, not on attention roles.

    The projections' E is gathered once for both sublayers in a parallel block, and reduced once: those entries are here, and the
    FFN's are left out.
    """
    model, tokens, useful = split.model, split.local_tokens, split.shape.useful
    passed = 2 * tokens * model.embed_dim // split.ways(split.between) if split.between else 0
    entries = split.pricing.small(SMALL, _PART, model.num_layers, elements=passed)
    if model.norms.before:
        entries += norm(split, _PART, tokens, split.between, model.num_layers, useful)
    query, key, out = projection_weights(split)
    for weight in (query, key, out):
        entries += weight.gathers(_PART)
    entries += gather_embed(split, _PART)
    embed = model.embed_dim // split.ways(split.e)
    heads = model.num_heads * model.head_dim // split.ways(split.f)
    kv = 2 * model.num_kv_heads * model.head_dim // split.ways(split.kv)
    shares = split.shares
    entries += [
        query.product(_PART, tokens, embed, heads, useful * shares.heads * shares.embed, model.head_dim),
        key.product(_PART, tokens, embed, kv, useful * shares.embed, model.head_dim),
    ]
    around = _heads_in_loops(split) if split.looped else []
    entries += [*around, out.product(_PART, tokens, heads, embed, useful * shares.heads * shares.embed)]
    if split.parallel:
        return entries
    entries += scatter_embed(split, _PART)
    return entries + norm_after(split, _PART)


def _heads_in_loops(split: StepSplit) -> list[Entry]:
    """A looped program's exchange of heads over E's axes: next to W_Q and W_O, in F's messages where the block is parallel."""
    elements = split.shape.num_tokens * split.model.num_heads * split.model.head_dim
    useful, partial, whole = split.shape.useful * split.shares.heads, Split(split.t, split.f, split.e), Split(split.t, split.f)
    scattered = Split(split.t, split.f + split.e)
    after = movement(split, _PART, HEADS_AFTER_Q, elements, partial, scattered, useful, rides=split.parallel)
    return after + movement(split, _PART, HEADS_BEFORE_O, elements, scattered, whole, useful, split.wide_dtype, split.parallel)


def decode_entries(split: StepSplit) -> list[Entry]:
    """The decode group: queries and new keys to the owners of the pages, the core over their context, and back."""
    shape, model, group = split.shape, split.model, split.decode
    if not shape.decode_rows:
        return []
    real_rows = shape.decode_rows if shape.real_rows is None else shape.real_rows
    useful = real_rows / shape.decode_rows
    entries = _to_group(split, group, shape.decode_rows, useful, DECODE)
    rows = ceil_div(shape.decode_rows, split.ways(group.batch))
    heads = model.num_heads // split.ways(group.heads)
    kv_heads = model.num_kv_heads // split.ways(group.kv)
    seen = shape.decode_context if shape.real_context is None else shape.real_context
    shards, share = split.ways(group.sequence), useful * split.shares.heads
    entries += _writes(split, rows, kv_heads)
    entries += decode_cores(split, rows, heads, kv_heads, shape.decode_context, shards, seen, share)
    return entries + _from_group(split, group, shape.decode_rows, useful, DECODE)


def _writes(split: StepSplit, rows: int, kv_heads: int) -> list[Entry]:
    """One token of every row into its page, where a kernel does that: of keys and of values the tile that has the token's place, of every
    head, and the scales of the page if there are any."""
    platform, head_dim = split.pricing.slice.chip.platform, split.model.head_dim
    row, joined = platform.lanes, platform.joins_keys_and_values(head_dim)
    columns = round_up(2 * head_dim, row) if joined else 2 * round_up(head_dim, row)
    scales = 2 * _F32 * round_up(kv_heads * (split.shape.page_size or PAGE_SIZE), row) if split.kv_bytes == 1 else 0
    num_bytes = float(rows * (kv_heads * TILE_COLUMN * columns + scales))
    return split.pricing.tile_writes(DECODE.write, _PART, split.model.num_layers, num_bytes)


def decode_cores(
    split: StepSplit, rows: int, heads: int, kv_heads: int, context: int, shards: int, seen: float, share: float = 1.0
) -> list[Entry]:
    """Products with one of `shards` shards of the `context` keys and values of each row on one device, for every window that layers have.

    Args:
        seen: of a row's keys, how many are not masked. share: of rows and heads that are useful.
    """
    found = []
    for window, count in split.windows:
        computed = split.decode_keys(context, window)
        useful = share * (min(seen, window) / computed if computed else 1.0)
        found.append(_decode_core(split, rows, heads, kv_heads, ceil_div(computed, shards), useful, count))
    return found


def _decode_core(split: StepSplit, rows: int, heads: int, kv_heads: int, keys: int, share: float, count: int) -> Entry:
    """Products with so many keys and values of each row on one device, of which a share is useful, in so many layers."""
    model, act = split.model, split.act_bytes
    flops = 4.0 * rows * heads * model.head_dim * keys
    kv_bytes = 2.0 * rows * keys * kv_heads * model.head_dim * split.kv_bytes
    passed = 2 * rows * heads * model.head_dim * act
    if not split.pricing.program.blocked_attention:
        passed += 2 * rows * heads * keys * (4 + act)  # scores in float32, probabilities: each written and read
    core = (rows, rows, heads, kv_heads, keys)
    overhead = split.pricing.kernel(rows) + rows * (split.shape.allocated or keys) * split.pricing.program.position_seconds
    return split.pricing.product(
        DECODE.core, _PART, count, flops, share, 0.0, kv_bytes, passed, EntryKind.ATTENTION, core, core_seconds=overhead
    )


def prefill_entries(split: StepSplit) -> list[Entry]:
    """The prompt tokens: to their attention state, new keys and values on to the owners of the pages, the core, and back."""
    shape, group = split.shape, split.prefill
    if not shape.prefill_tokens:
        return []
    real_tokens = shape.prefill_tokens if shape.real_tokens is None else shape.real_tokens
    useful = real_tokens / shape.prefill_tokens
    entries = _to_group(split, group, shape.prefill_tokens, useful, PREFILL)
    entries += _own_cores(split, useful * split.shares.heads)
    return entries + _from_group(split, group, shape.prefill_tokens, useful, PREFILL)


def _own_cores(split: StepSplit, useful: float = 1.0) -> list[Entry]:
    """Of the step's prompt tokens on one device."""
    shape, model, group = split.shape, split.model, split.prefill
    batch_ways = split.ways(group.batch)
    slots, tokens = ceil_div(shape.prefill_slots, batch_ways), ceil_div(shape.prefill_tokens, batch_ways)
    heads, kv_heads = model.num_heads // split.ways(group.heads), model.num_kv_heads // split.ways(group.kv)
    return prefill_cores(split, slots, tokens, heads, kv_heads, split.ways(group.sequence), useful)


def cache_entries(split: StepSplit) -> list[Entry]:
    """What couples prefill to decode's cache: new keys and values go to the owners of the pages, earlier context comes back."""
    shape, model, group, owners = split.shape, split.model, split.prefill, split.decode
    if not shape.prefill_tokens:
        return []
    shared = tuple(axis for axis in owners.batch if axis in group.batch)
    width = 2 * model.num_kv_heads * model.head_dim
    here = Split(group.batch, group.kv)
    moved = movement(split, _PART, NEW_TO_CACHE, shape.prefill_tokens * width, here, Split(shared, owners.kv))
    entries = behind(
        moved, lambda: sum(core.seconds * core.count for core in _own_cores(split)) / model.num_layers, split.pricing, _TO_CACHE
    )
    for window, layers in split.windows:
        keys = split.earlier_keys(window, moved=True)
        if keys:
            entries += _earlier(split, shape.prefill_slots * keys * width, shared, layers)
    kv_heads = model.num_kv_heads // split.ways(owners.kv)
    written = shape.prefill_tokens // split.ways(shared + owners.sequence) * 2 * kv_heads * model.head_dim
    if moved:
        entries += split.pricing.small(PREFILL.passes, _PART, model.num_layers, times=0.0, elements=written)
    entries.append(split.pricing.traffic(PREFILL.write, _PART, model.num_layers, written * split.kv_bytes))
    return entries


def _earlier(split: StepSplit, elements: int, shared: Axes, layers: int) -> list[Entry]:
    """Earlier context to where prompt tokens attend to it: from its owners over the batch axes that only decode has, then the pages that
    other devices along decode's sequence axes have, which make the payload grow."""
    group, owners = split.prefill, split.decode
    alone = tuple(axis for axis in owners.batch if axis not in shared)
    away = tuple(axis for axis in owners.sequence if axis not in group.sequence)
    near = Split(*(tuple(axis for axis in axes if axis not in away) for axes in (group.batch, group.kv)))
    stored = tuple(axis for axis in owners.sequence if axis not in away or axis not in group.batch)
    rest = tuple(axis for axis in stored if axis not in away)
    here = elements // split.ways(owners.sequence)
    entries = movement(split, _PART, EARLIER, here, Split(shared, owners.kv, alone), near, count=layers)
    others = elements // split.ways(near.cols)
    entries += movement(split, _PART, EARLIER, others, Split(near.rows, owners.sequence), Split(group.batch, stored), count=layers)
    others = elements // split.ways(group.batch)
    return entries + movement(split, _PART, EARLIER, others, Split(stored, near.cols), Split(rest, group.kv), count=layers)


def prefill_cores(split: StepSplit, slots: int, tokens: int, heads: int, kv_heads: int, shards: int, useful: float = 1.0) -> list[Entry]:
    """So many tokens of so many prompts on one device, with one of `shards` shards of their keys, for every window that layers have; a
    share of tokens and heads is useful."""
    return [_prefill_core(split, slots, tokens, heads, kv_heads, shards, useful, *window) for window in split.windows]


def _prefill_core(
    split: StepSplit, slots: int, tokens: int, heads: int, kv_heads: int, shards: int, useful: float, window: int, count: int
) -> Entry:
    shape, model, program = split.shape, split.model, split.pricing.program
    own, context = tokens / max(slots, 1), split.earlier_keys(window)
    keys_all = (slots * context + tokens) // shards
    computed, tiles = context + own, split.pricing.slice.chip.platform.tiles
    if tiles.skip:  # a tile of queries reaches over the windows of all its tokens
        computed = min(computed, window + tiles.prompt_keys)
    keys = computed / shards if program.per_prompt_attention else keys_all
    seen = _seen(own, shape.prefill_context, window) / shards
    pairs = tokens * keys
    passed = 2 * tokens * heads * model.head_dim * split.act_bytes
    if not program.blocked_attention:
        passed += int(2 * pairs * heads * (4 + split.act_bytes))
    kv_bytes = 2.0 * keys_all * kv_heads * model.head_dim * split.act_bytes
    flops = 4.0 * pairs * heads * model.head_dim
    share = min(1.0, useful * seen / keys) if keys else 1.0
    core = (slots, tokens, heads, kv_heads, context // shards)
    done, seconds = pairs, 0.0
    if program.tile_loop and pairs:
        kernel = tiles.takes_prompts(heads, kv_heads, model.head_dim)
        own = tiles.kernel_pairs(tokens, slots, max(heads // max(kv_heads, 1), 1), window) / shards if kernel else 0.0
        done, seconds = _tile_loop(split, slots, tokens, heads, shards, window, fresh=not kernel)
        seconds += split.pricing.prompt_kernel(4.0 * own * heads * model.head_dim)
    return split.pricing.product(
        PREFILL.core,
        _PART,
        count,
        flops,
        share,
        0.0,
        kv_bytes,
        passed,
        EntryKind.ATTENTION,
        core,
        prompt=True,
        core_seconds=seconds,
        done=done / pairs if pairs else 1.0,
    )


def _seen(own: float, context: int, window: int) -> float:
    """Keys that a token of a prompt sees on average, of `own` tokens after so much context: a causal prompt sees half of itself."""
    grows = min(max(window - context, 0), own)  # tokens whose window reaches back to the start
    return ((context + (grows + 1) / 2) * grows + window * (own - grows)) / own if grows < own else context + (own + 1) / 2


def _tile_loop(split: StepSplit, slots: int, tokens: int, heads: int, shards: int, window: int, fresh: bool) -> tuple[float, float]:
    """Pairs of a query and a key for which a loop over tiles makes scores, and its time on the core in addition to the products.

    Queries and keys of all prompts of a device lie in one row; of earlier context a tile of queries visits that of its own slots. Every
    pair of tiles is visited, and of a window no more is made than what a tile of queries reaches over.

    Args:
        fresh: the loop goes over the step's own keys too, which no kernel takes.
    """
    tiles, context = split.pricing.slice.chip.platform.tiles, split.shape.prefill_context // shards
    keys, reach = max(tokens // shards, 1), window + tiles.prompt_keys
    seen, together = tiles.seen_shares(tokens, slots, heads)
    queries, pairs = tiles.count(tokens, keys if fresh else 0, heads)
    _, earlier = tiles.count(tokens, context, heads)
    if not (fresh or context):
        return 0.0, 0.0
    own = tokens * (min(seen * keys, reach / shards) if tiles.skip else keys) if fresh else 0.0
    before = tokens * min(context, reach / shards) * slots * together
    return own + before, split.pricing.tile_loop((own + before) * heads, pairs + earlier * slots * together, queries)


def _to_group(split: StepSplit, group: Group, tokens: int, useful: float, items: GroupItems) -> list[Entry]:
    model = split.model
    target_q, target_kv = Split(group.batch, group.heads), Split(group.batch, group.kv)
    rows, heads = ceil_div(tokens, split.ways(group.batch)), model.num_heads // split.ways(group.heads)
    queries, keys = tokens * model.num_heads * model.head_dim, 2 * tokens * model.num_kv_heads * model.head_dim
    share = useful * split.shares.heads
    moved_q = movement(split, _PART, items.queries, queries, split.q_projected, target_q, share)
    moved_kv = movement(split, _PART, items.keys, keys, split.kv_projected, target_kv, useful)
    kv_heads, tiles = model.num_kv_heads // split.ways(group.kv), split.pricing.slice.chip.platform.tiles
    own_q, own_kv = rows * heads * model.head_dim, 2 * rows * kv_heads * model.head_dim
    passed = own_q * (3 if moved_q else 1) + own_kv * (2 if moved_kv else 1)  # what comes back is exchanged as the queries were
    if items is PREFILL and tiles.takes_prompts(heads, kv_heads, model.head_dim):
        passed += 2 * own_q  # the kernel wants queries by group, and gives its results so
    moved = split.pricing.small(items.passes, _PART, model.num_layers, times=0.0, elements=passed)
    if split.parallel:
        moved += behind(moved_q + moved_kv, lambda: mean_seconds(split, tokens, W_IN), split.pricing)
    else:
        moved += moved_q + behind(moved_kv, lambda: _query_seconds(split, tokens), split.pricing)
    if model.qk_norm is not QkNorm.WIDTH:
        return moved
    return moved + [
        norm_collective(split, HEADS_NORM, _PART, model.num_layers, axes, rows, useful) for axes in (group.heads, group.kv) if axes
    ]


def _from_group(split: StepSplit, group: Group, tokens: int, useful: float, items: GroupItems) -> list[Entry]:
    model, share = split.model, useful * split.shares.heads
    entries = []
    if group.sequence:
        rows, heads = ceil_div(tokens, split.ways(group.batch)), model.num_heads // split.ways(group.heads)
        size, op = split.ways(group.sequence) * rows * heads * 4, Op.ALL_GATHER
        axes = group.sequence
        entries.append(split.pricing.collective(items.mass, _PART, model.num_layers, op, axes, size, "f32", share))
    source, elements = Split(group.batch, group.heads, group.sequence), tokens * model.num_heads * model.head_dim
    back = movement(split, _PART, items.back, elements, source, split.heads_wanted, share)
    early = split.parallel and items is PREFILL  # in decode few compilers start it early
    return entries + (behind(back, lambda: mean_seconds(split, tokens, W_OUT), split.pricing) if early else back)


def _query_seconds(split: StepSplit, tokens: int) -> float:
    """What W_Q's product takes for so many of the step's tokens."""
    embed, heads = split.model.embed_dim // split.ways(split.e), split.model.num_heads * split.model.head_dim // split.ways(split.f)
    return product_seconds(split, W_Q, tokens, embed, heads, split.model.head_dim)
