"""Bytes that one device must hold: weights, KV cache, and the largest set of activations that lives at once; and how many pages of the
cache fit with the rest.

Weights and cache are exact, leaf by leaf. Activations are the largest of the sublayers' working sets: what a product reads and writes,
gathered weights next to it, and the residual stream; a compiler may need less, and the compiled program is what counts in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from partinf.cost.attention import projection_weights
from partinf.cost.experts import expert_bytes
from partinf.cost.ffn import ffn_weights, matrices_in
from partinf.cost.linear import Weight
from partinf.cost.movement import ways
from partinf.cost.split import StepSplit
from partinf.cost.stages import carried_bytes
from partinf.foundation.paging import chunk_pages, window_pages
from partinf.foundation.rounding import ceil_div, round_up
from partinf.foundation.units import readable_bytes
from partinf.hardware.slices import Slice
from partinf.layout import AttentionRole, Layout, Role, kv_head_axes, letter_axes
from partinf.model.config import ModelConfig
from partinf.model.weights import held_bytes
from partinf.workload import DType

_F32 = 4
# Keys per block where scores are made block by block.
_SCORE_BLOCK = 512


class MemoryBudget(NamedTuple):
    """Bytes on one device, and how many a program may use."""

    weights: int
    kv: int
    activations: int
    usable: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= self.usable


class Room(NamedTuple):
    """What one device of an engine holds in addition to the pages of its cache, in bytes.

    Attributes:
        usable: what a program may use. weights: of this device. code: of all compiled programs.
        state: what slots keep outside pages: counts, biases and masks of the vocabulary.
        activations: of the largest step that is compiled.
    """

    usable: int
    weights: int
    code: int
    state: int
    activations: int

    @property
    def left(self) -> int:
        """What pages may take; less than 0 where the rest does not fit."""
        return self.usable - self.weights - self.code - self.state - self.activations

    def divided(
        self, share: float, page_bytes: Sequence[int], windows: Sequence[tuple[int, int]], most: int, longest: int
    ) -> tuple[int, ...]:
        """Pages of every group of the cache, per part of a shard.

        What windows need has a bound, so their groups are given it: what as many sequences as may be resident keep at their peak, and what
        prompts of one step take more. The group that keeps all positions, the first if there is one, takes the rest, and it is what decides
        how much is served. Where memory is short, windows are given no more than is of use: a sequence that fills its window has as many
        pages in the first group, and one sequence of the longest context has to fit there. Without such a group windows take all.

        Args:
            share: of what is left that becomes pages; the rest is for what the compiler needs beyond this account.
            page_bytes: of one page of each group on a device that has it. windows: pages that one sequence keeps of each, and those that
                prompts take more. most: sequences of a shard. longest: pages of the longest context, 0 without a group that keeps all.
        """
        room = max(0, int(share * self.left))
        of_windows = page_bytes[-len(windows) :] if windows else ()
        each = sum(size * own for size, (own, _) in zip(of_windows, windows, strict=True))
        free = room - sum(size * more for size, (_, more) in zip(of_windows, windows, strict=True))
        if not longest:
            return tuple(own * free // each + more for own, more in windows) if free >= each else (0,) * len(windows)
        if windows:
            of_use = free // (each + page_bytes[0] * max(own for own, _ in windows))
            most = max(1, min(most, of_use, (free - longest * page_bytes[0]) // each))
        taken = tuple(most * own + more for own, more in windows)
        left = room - sum(size * count for size, count in zip(of_windows, taken, strict=True))
        return max(0, left // page_bytes[0]), *taken


class Held(NamedTuple):
    """What one device of an engine of a given size holds: what plan, proof, simulator and server name.

    Attributes:
        page_bytes: of one page of each group of the cache. pages: of each group, on one device.
        tokens: positions that the pages of all devices hold: those of the group that keeps all, or else those of its windows.
        windows: of each group, 0 for all positions. peak: pages of each that one sequence takes while a chunk of its prompt is computed,
            and those that it keeps after that; of a group that keeps all, both are those of the longest context.
    """

    room: Room
    page_bytes: tuple[int, ...]
    pages: tuple[int, ...]
    tokens: int
    windows: tuple[int, ...] = (0,)
    peak: tuple[tuple[int, int], ...] = ()

    @property
    def cache(self) -> int:
        """Bytes of all pages on one device."""
        return sum(size * count for size, count in zip(self.page_bytes, self.pages, strict=True))

    @property
    def slack(self) -> int:
        """What is free; negative where it does not fit."""
        return self.room.left - self.cache

    def as_json(self) -> dict[str, Any]:
        """Bytes of one device by what they are for."""
        return {
            **self.room._asdict(),
            "cache": self.cache,
            "slack": self.slack,
            "page_bytes": list(self.page_bytes),
            "pages": list(self.pages),
            "windows": list(self.windows),
            "kv_tokens": self.tokens,
        }

    @property
    def _division(self) -> str:
        """How memory is divided among the groups of the cache; nothing where there is one."""
        if len(self.windows) == 1:
            return ""
        parts = []
        for window, size, pages, (chunk, own) in zip(self.windows, self.page_bytes, self.pages, self.peak, strict=True):
            takes = f"{own:,} per sequence, {chunk:,} during its prefill" if window else f"{own:,} for the longest sequence"
            name = f"windows of {window:,}" if window else "all positions"
            parts.append(f"{name} {size * pages / 1e9:.2f} GB in {pages:,} pages of {size / 1e3:,.1f} kB ({takes})")
        return "; KV by group of layers: " + ", ".join(parts)

    def __str__(self) -> str:
        room = self.room
        parts = {"weights": room.weights, "programs and slots": room.code + room.state, "activations": room.activations}
        others = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts.items())
        return (
            f"{self.tokens:,} tokens of KV; per device: KV {readable_bytes(self.cache)}, {others}, "
            f"free {readable_bytes(self.slack)} of {readable_bytes(room.usable)}{self._division}"
        )


def slot_bytes(vocab_size: int, extended: bool, constrained: bool) -> int:
    """What one slot keeps on a device outside pages.

    Args:
        vocab_size: entries of the vocabulary on the device. extended: counts (int32), marks (uint8) and biases (float32) of each.
        constrained: a mask of them, in words of 32 bits.
    """
    return 4 + 9 * vocab_size * extended + 4 * ceil_div(vocab_size, 32) * constrained


def usable_bytes(slice_: Slice) -> int:
    """HBM that a program may use on one device."""
    return slice_.chip.usable_hbm_per_device()


def weight_bytes(split: StepSplit) -> int:
    """Weights on one device: its stage's layers, and what stands before and after them, which every stage has."""
    axes = letter_axes(split.layout, split.sizes, split.model.num_kv_heads)
    ways = {letter: split.ways(over) for letter, over in axes.items() if letter != "N"}  # the model is one stage's already
    return held_bytes(split.model, ways, split.weight_dtype, split.pricing.slice.chip.platform.held_entries)


def page_bytes(model: ModelConfig, layout: Layout, slice_: Slice, kv: DType, page_size: int, num_layers: int) -> int:
    """One page of a group of the cache on a device that has it: keys and values of all its layers and heads; those of int8 each have a row
    of float32 scales, filled up to whole lanes.

    Args:
        num_layers: of the group, in all stages.
    """
    sizes = slice_.axis_sizes
    decode_heads = layout.decode.attention_axes(AttentionRole.HEADS)
    split_heads = tuple(axis for axis in kv_head_axes(layout, sizes, model.num_kv_heads) if axis in decode_heads)
    layers, heads = num_layers // ways(layout.storage_axes(Role.STAGE), sizes), model.num_kv_heads // ways(split_heads, sizes)
    scales = _F32 * round_up(heads * page_size, slice_.chip.platform.lanes) if kv is DType.INT8 else 0
    return layers * 2 * (page_size * heads * model.head_dim * kv.num_bytes + scales)


def kv_bytes(
    model: ModelConfig,
    layout: Layout,
    slice_: Slice,
    rows: int,
    context: int,
    kv: DType,
    prompts: tuple[int, int] = (0, 0),
    page_size: int = 16,
) -> int:
    """The cache of `rows` sequences of `context` tokens on one device, in whole pages.

    Args:
        prompts: tokens and slots of prompts that one step computes meanwhile, whose windows take more pages (`chunk_pages`).
    """
    sizes = slice_.axis_sizes
    batch = layout.decode.attention_axes(AttentionRole.BATCH)
    lanes = ceil_div(rows, ways(batch, sizes))
    sequence_shards = ways(layout.decode.attention_axes(AttentionRole.SEQUENCE), sizes)
    shared = ways(tuple(axis for axis in layout.prefill.attention_axes(AttentionRole.BATCH) if axis in batch), sizes)
    tokens, slots = (ceil_div(count, shared) for count in prompts)  # that may belong to one shard
    total = 0
    for window, num_layers in model.kept_windows(context):
        each = page_bytes(model, layout, slice_, kv, page_size, num_layers)
        own = window_pages(window or context, context, page_size, sequence_shards)
        total += each * (lanes * own + (chunk_pages(tokens, slots, page_size, sequence_shards) if window else 0))
    return total


class LinearSet(NamedTuple):
    """Working sets that do not depend on attention roles.

    Attributes:
        residual: the stream that lives all the time, and in a pipeline what waits for the next tick.
        largest: of the FFN's products and the logits.
        attention: what is live during the attention core: its input and a gathered W_Q.
    """

    residual: int
    largest: int
    attention: int


def linear_set(split: StepSplit) -> LinearSet:
    """The part of `activation_bytes` that all attention roles share."""
    dense = dense_set(split)
    return dense._replace(largest=max(dense.largest, expert_bytes(split)))


def dense_set(split: StepSplit) -> LinearSet:
    """The same without experts."""
    model, shape, act = split.model, split.shape, split.act_bytes
    tokens = split.local_tokens
    embed_spread, embed = model.embed_dim // split.ways(split.between), model.embed_dim // split.ways(split.e)
    query, key, out = projection_weights(split)
    widths = [(of, *ffn_weights(split, of, count)) for of, count in model.feed_forwards]
    queries = _gathered(query)
    if split.ahead:  # all that a layer gathers, and what the next one needs first
        queries = 2 * _gathered(query, key) + _gathered(out)
        queries += max((2 * _gathered(w_in) + _gathered(w_out) for _, w_in, w_out in widths), default=0)
    fed, rows = tokens * embed * act, shape.decode_rows // split.ways(split.replica) + shape.prefill_slots
    largest = rows * model.padded_vocab_size // split.ways(tuple(a for a in split.w_stored if a not in split.logit_cols)) * _F32
    for of, w_in, w_out in widths:
        hidden = tokens * of.width // split.ways(split.f) * act
        before, after = (queries if split.ahead else _gathered(weight) for weight in (w_in, w_out))
        largest = max(largest, fed + matrices_in(of) * hidden + before, fed + hidden + after)
    return LinearSet(tokens * embed_spread * act + carried_bytes(split), largest, fed + queries)


def activation_bytes(split: StepSplit, linear: LinearSet | None = None) -> int:
    """The largest working set of one step on one device; `linear` is worked out when it is not given."""
    shared = linear or linear_set(split)
    return shared.residual + max(shared.largest, shared.attention + _core_bytes(split))


def _gathered(*weights: Weight) -> int:
    """Bytes of these weights, of which each is gathered before use, or none."""
    return sum(weight.used_bytes for weight in weights if weight.used_bytes > weight.stored_bytes)


def _core_bytes(split: StepSplit) -> int:
    """Queries, keys, values and scores of the core."""
    model, shape, act = split.model, split.shape, split.act_bytes
    total = 0
    for group, tokens, slots, keys in (
        (split.decode, shape.decode_rows, shape.decode_rows, shape.decode_context),
        (split.prefill, shape.prefill_tokens, shape.prefill_slots, 0),
    ):
        if not tokens:
            continue
        batch_ways, sequence_ways = split.ways(group.batch), split.ways(group.sequence)
        heads, kv_heads = model.num_heads // split.ways(group.heads), model.num_kv_heads // split.ways(group.kv)
        local = ceil_div(tokens, batch_ways)
        total += local * (3 * heads + 2 * kv_heads) * model.head_dim * act
        seen = ceil_div(keys or ceil_div(tokens, max(slots, 1)) + shape.prefill_context, sequence_ways)
        if split.pricing.program.blocked_attention:
            total += local * heads * min(seen, _SCORE_BLOCK) * _F32
        else:
            total += local * heads * (keys or local + ceil_div(slots, batch_ways) * shape.prefill_context) // sequence_ways * (_F32 + act)
    return total
