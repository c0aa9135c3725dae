"""Bytes that one device must hold: weights, KV cache, and the largest set of activations that lives at once.

Weights and cache are exact, leaf by leaf. Activations are the largest of the sublayers' working sets: what a product reads and writes,
gathered weights beside it, and the residual stream; a compiler may need less, and the compiled program is what counts in the end.
"""

from __future__ import annotations

from typing import NamedTuple

from partinf.cost.attention import projection_weights
from partinf.cost.ffn import ffn_weights, matrices_in
from partinf.cost.movement import ways
from partinf.cost.split import StepSplit
from partinf.cost.stages import carried_bytes
from partinf.foundation.rounding import ceil_div
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


def usable_bytes(slice_: Slice) -> int:
    """HBM that a program may use on one device."""
    return slice_.chip.usable_hbm_per_device()


def weight_bytes(split: StepSplit) -> int:
    """Weights on one device: its stage's layers, and what stands before and after them, which every stage has."""
    axes = letter_axes(split.layout, split.sizes, split.model.num_kv_heads)
    ways = {letter: split.ways(over) for letter, over in axes.items() if letter != "N"}  # the model is one stage's already
    return held_bytes(split.model, ways, split.weight_dtype)


def kv_bytes(model: ModelConfig, layout: Layout, slice_: Slice, rows: int, context: int, kv: DType, page_size: int = 16) -> int:
    """The cache of `rows` sequences of `context` tokens on one device, in whole pages."""
    sizes = slice_.axis_sizes
    decode_heads = layout.decode.attention_axes(AttentionRole.HEADS)
    split_heads = tuple(axis for axis in kv_head_axes(layout, sizes, model.num_kv_heads) if axis in decode_heads)
    lanes = ceil_div(rows, ways(layout.decode.attention_axes(AttentionRole.BATCH), sizes))
    parts = ways(layout.decode.attention_axes(AttentionRole.SEQUENCE), sizes)
    tokens = ceil_div(context, page_size * parts) * page_size
    per_token = 2 * model.num_kv_heads // ways(split_heads, sizes) * model.head_dim * kv.num_bytes
    return model.num_layers // ways(layout.storage_axes(Role.STAGE), sizes) * lanes * tokens * per_token


class LinearSet(NamedTuple):
    """Working sets that do not depend on attention roles.

    Attributes:
        residual: the stream that lives all the time, and in a pipeline what waits for the next tick.
        largest: of the FFN's products and the logits.
        attention: what the attention core finds beside itself: its input and a gathered W_Q.
    """

    residual: int
    largest: int
    attention: int


def linear_set(split: StepSplit) -> LinearSet:
    """The part of `activation_bytes` that all attention roles share."""
    model, shape, act = split.model, split.shape, split.act_bytes
    tokens = split.local_tokens
    embed_spread, embed = model.embed_dim // split.ways(split.between), model.embed_dim // split.ways(split.e)
    hidden = tokens * model.ffn_dim // split.ways(split.f)
    w_in, w_out = ffn_weights(split)
    query, key, out = projection_weights(split)
    fed, widened = tokens * embed * act, matrices_in(split) * hidden * act
    rows = shape.decode_rows // split.ways(split.replica) + shape.prefill_slots
    if split.ahead:  # all that a layer gathers, and what the next one needs first
        first, last = (sum(_gathered(w.used_bytes, w.stored_bytes) for w in group) for group in ((w_in, query, key), (w_out, out)))
        before = after = queries = 2 * first + last
    else:
        before, after, queries = (_gathered(w.used_bytes, w.stored_bytes) for w in (w_in, w_out, query))
    largest = max(fed + widened + before, fed + hidden * act + after, rows * model.padded_vocab_size * _F32)
    return LinearSet(tokens * embed_spread * act + carried_bytes(split), largest, fed + queries)


def activation_bytes(split: StepSplit, linear: LinearSet | None = None) -> int:
    """The largest working set of one step on one device; `linear` is worked out when it is not given."""
    shared = linear or linear_set(split)
    return shared.residual + max(shared.largest, shared.attention + _core_bytes(split))


def _gathered(used: int, stored: int) -> int:
    return used if used > stored else 0


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
        dealt, parts = split.ways(group.batch), split.ways(group.sequence)
        heads, kv_heads = model.num_heads // split.ways(group.heads), model.num_kv_heads // split.ways(group.kv)
        local = ceil_div(tokens, dealt)
        total += local * (3 * heads + 2 * kv_heads) * model.head_dim * act
        seen = ceil_div(keys or ceil_div(tokens, max(slots, 1)) + shape.prefill_context, parts)
        if split.pricing.program.blocked_attention:
            total += local * heads * min(seen, _SCORE_BLOCK) * _F32
        else:
            total += local * heads * (keys or local + ceil_div(slots, dealt) * shape.prefill_context) // parts * (_F32 + act)
    return total
