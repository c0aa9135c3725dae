"""Entries of the FFN sublayer, written once for every role assignment.

[T.t, E.e] · W_in → [T.t, F.f] {e unreduced}; reduce-scatter over e; activation; all-gather over e; · W_out → [T.t, E.e] {f unreduced}.
"""

from __future__ import annotations

from partinf.cost.items import F_AFTER_IN, F_BEFORE_OUT, W_IN, W_OUT
from partinf.cost.ledger import Entry, Part
from partinf.cost.linear import Weight, gather_embed, movement, norm, norm_after, scatter_embed
from partinf.cost.movement import Split
from partinf.cost.split import StepSplit

_PART = Part.FFN


def matrices_in(split: StepSplit) -> int:
    """Input matrices stored together: gate and up, or one."""
    return 2 if split.model.gated else 1


def ffn_weights(split: StepSplit) -> tuple[Weight, Weight]:
    """W_in (gate and up together where there are two) and W_out."""
    hidden = split.model.ffn_dim
    return (
        Weight(split, W_IN, matrices_in(split) * hidden, split.f_stored, split.f),
        Weight(split, W_OUT, hidden, split.f_stored, split.f, to_embed=True),
    )


def ffn_entries(split: StepSplit) -> list[Entry]:
    """The sublayer for all tokens of the step. In a parallel block the norm and the gather of E are those of attention."""
    model, tokens, useful = split.model, split.local_tokens, split.shape.useful
    inner = matrices_in(split)
    own = not split.parallel
    entries = norm(split, _PART, tokens, split.between, model.num_layers, useful) if own and model.norms.before else []
    w_in, w_out = ffn_weights(split)
    entries += w_in.gathers(_PART) + w_out.gathers(_PART)
    if own:
        entries += gather_embed(split, _PART)
    embed, ffn = model.embed_dim // split.ways(split.e), model.ffn_dim // split.ways(split.f)
    share = useful * split.shares.ffn * split.shares.embed
    elements = split.shape.num_tokens * model.ffn_dim
    whole, scattered = Split(split.t, split.f), Split(split.t, split.f + split.e)  # scattering tokens instead moves the same
    partial = Split(split.t, split.f, split.e)
    entries.append(w_in.product(_PART, tokens, embed, inner * ffn, share))
    entries += movement(split, _PART, F_AFTER_IN, inner * elements, partial, scattered, useful * split.shares.ffn)
    entries += movement(split, _PART, F_BEFORE_OUT, elements, scattered, whole, useful * split.shares.ffn, split.wide_dtype)
    entries.append(w_out.product(_PART, tokens, ffn, embed, share))
    return entries + scatter_embed(split, _PART) + norm_after(split, _PART)
