"""Entries of the feed-forwards that all tokens go through, written once for every role assignment.

[T.t, E.e] · W_in → [T.t, F.f] {e unreduced}; reduce-scatter over e; activation; all-gather over e; · W_out → [T.t, E.e] {f unreduced}.

A model may have several widths: of layers without experts, and of of the dense part next to experts (`partinf.cost.experts`). Each has its
entries, as often as there are such layers.
"""

from __future__ import annotations

from partinf.cost.items import F_AFTER_IN, F_BEFORE_OUT, W_IN, W_OUT, Matrix
from partinf.cost.ledger import Entry, Part
from partinf.cost.linear import Weight, gather_embed, movement, norm, norm_after, product_seconds, scatter_embed
from partinf.cost.movement import Split
from partinf.cost.split import StepSplit
from partinf.model.kinds import FeedForward

_PART = Part.FFN


def matrices_in(of: FeedForward) -> int:
    """Input matrices stored together: gate and up, or one."""
    return 2 if of.gated else 1


def ffn_weights(split: StepSplit, of: FeedForward, count: int) -> tuple[Weight, Weight]:
    """W_in (gate and up together where there are two) and W_out of so many layers."""
    return (
        Weight(split, W_IN, matrices_in(of) * of.width, split.f_stored, split.f, count=count),
        Weight(split, W_OUT, of.width, split.f_stored, split.f, to_embed=True, count=count),
    )


def ffn_entries(split: StepSplit) -> list[Entry]:
    """The sublayer for all tokens of the step, without experts. In a parallel block the norm and the gather of E are those of attention."""
    model, own, entries = split.model, not split.parallel, []
    if own and model.norms.before:
        entries += norm(split, _PART, split.local_tokens, split.between, model.num_layers, split.shape.useful)
    for of, count in model.feed_forwards:
        entries += _of_width(split, of, count)
    return entries + ([] if own else scatter_embed(split, _PART)) + norm_after(split, _PART)


def _of_width(split: StepSplit, of: FeedForward, count: int) -> list[Entry]:
    """The feed-forwards of one width, in so many layers."""
    tokens, useful, inner, own = split.local_tokens, split.shape.useful, matrices_in(of), not split.parallel
    w_in, w_out = ffn_weights(split, of, count)
    entries = w_in.gathers(_PART) + w_out.gathers(_PART)
    if own:
        entries += gather_embed(split, _PART, count)
    embed, ffn = split.model.embed_dim // split.ways(split.e), of.width // split.ways(split.f)
    share = useful * split.shares.ffn * split.shares.embed
    elements = split.shape.num_tokens * of.width
    whole, scattered = Split(split.t, split.f), Split(split.t, split.f + split.e)  # scattering tokens instead moves the same
    partial, hidden = Split(split.t, split.f, split.e), useful * split.shares.ffn
    entries.append(w_in.product(_PART, tokens, embed, inner * ffn, share))
    entries += movement(split, _PART, F_AFTER_IN, inner * elements, partial, scattered, hidden, count=count)
    entries += movement(split, _PART, F_BEFORE_OUT, elements, scattered, whole, hidden, split.wide_dtype, count=count)
    entries.append(w_out.product(_PART, tokens, ffn, embed, share))
    return entries + (scatter_embed(split, _PART, count) if own else [])


def mean_seconds(split: StepSplit, tokens: int, matrix: Matrix) -> float:
    """What the products of a layer's feed-forward with W_in or W_out take for so many of the step's tokens, in the mean over layers."""
    embed, total = split.model.embed_dim // split.ways(split.e), 0.0
    for of, count in split.model.feed_forwards:
        ffn = of.width // split.ways(split.f)
        sides = (embed, matrices_in(of) * ffn) if matrix is W_IN else (ffn, embed)
        total += product_seconds(split, matrix, tokens, *sides) * count
    return total / split.model.num_layers
