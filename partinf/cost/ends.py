"""Entries before the first layer and after the last: embedding, rows that are sampled, logits, and the choice of tokens.

The table is stored [V, E over all weight axes]. Lookup is local, then the tokens go where the linear layers split them. Logits are made
for sampled rows only and reduce-scattered, axis by axis, into V; where they have a table of their own, that is split over V.
"""

from __future__ import annotations

from partinf.cost.extended_sampling import extended_entries
from partinf.cost.items import (
    CHOOSE,
    CHOSEN,
    DECODE,
    LAST_TO_LOGITS,
    LAST_TOKENS,
    LOGITS,
    LOGITS_INTO_V,
    LOOKUP,
    MASKS,
    PICK,
    PREFILL,
    READ_LOGITS,
    ROWS_TO_LOGITS,
    Item,
)
from partinf.cost.ledger import Entry, Op, Part
from partinf.cost.linear import norm
from partinf.cost.movement import Split
from partinf.cost.split import StepSplit
from partinf.foundation.rounding import ceil_div

_F32 = 4
_MASK_BITS = 32  # of a word of masks
# Greedy selection asks for the largest logit (twice: for the choice and for the log-sum-exp), the lowest entry that has it, the
# log-sum-exp and the chosen logit.
_GREEDY_F32, _GREEDY_INT32 = 4, 1
# Sampling adds a maximum and an argmax, the kept mass, and one count or mass per bit of the thresholds of top-k and top-p.
_BITS = 32
_SAMPLING_F32, _SAMPLING_INT32 = 1 + 1 + 1 + _BITS, 1 + _BITS


def embedding_entries(split: StepSplit) -> list[Entry]:
    """Lookup of this step's tokens and the exchange over gathered axes."""
    shape, model = split.shape, split.model
    entries: list[Entry] = []
    looked_up = shape.num_tokens // split.ways(split.replica) * model.embed_dim // split.ways(split.w_stored)
    entries.append(split.pricing.traffic(LOOKUP, Part.EMBEDDING, 1, 2 * looked_up * split.act_bytes))
    stored, used = Split(split.replica, split.w_stored), Split(split.t, split.between)
    for tokens, group in ((shape.decode_rows, DECODE), (shape.prefill_tokens, PREFILL)):
        if not tokens:
            continue
        elements = tokens * model.embed_dim
        entries += _moved(split, Part.EMBEDDING, group.embedded, elements, stored, used, split.shape.useful)
    return entries


def logits_entries(split: StepSplit) -> list[Entry]:
    """Rows that are sampled, final norm, logits, and the choice of tokens."""
    shape = split.shape
    rows = shape.decode_rows // split.ways(split.replica) + shape.prefill_slots
    if not rows:
        return []
    real_rows = shape.decode_rows if shape.real_rows is None else shape.real_rows
    real_slots = shape.prefill_slots if shape.real_slots is None else shape.real_slots
    useful = (real_rows + real_slots) / (shape.decode_rows + shape.prefill_slots)
    entries = _sampled_rows(split) + _logits_of(split, rows, 1, useful) + _choice(split, rows, useful)
    return entries + (extended_entries(split, rows, useful, _logits_of) if shape.extended else [])


def _logits_of(split: StepSplit, rows: int, times: int, useful: float) -> list[Entry]:
    """Norm, logits and their way into V for so many rows, so many times."""
    model = split.model
    cols = split.logit_cols
    ready = tuple(axis for axis in split.w_stored if axis not in cols)  # axes that split V before the product
    entries = norm(split, Part.LOGITS, rows, cols, times, useful) if model.final_norm else []
    embed, vocab = model.embed_dim // split.ways(cols), model.padded_vocab_size // split.ways(ready)
    flops = 2.0 * rows * embed * vocab
    table = vocab * embed * split.act_bytes
    share = useful * split.shares.embed * model.vocab_size / model.padded_vocab_size
    passed = rows * (embed * split.act_bytes + vocab * _F32)
    entries.append(
        split.pricing.product(LOGITS, Part.LOGITS, times, flops, share, table, activation_bytes=passed, shape=(rows, embed, vocab))
    )
    source, target = Split(cols=ready, unreduced=cols), Split(cols=ready + cols)
    for op, axes, count in split.moves(rows * model.padded_vocab_size, source, target):
        entries.append(split.pricing.collective(LOGITS_INTO_V, Part.LOGITS, times, op, axes, count * _F32, "f32", useful))
    return entries


def _sampled_rows(split: StepSplit) -> list[Entry]:
    shape, model = split.shape, split.model
    held, wanted = Split(split.t, split.between), Split(split.replica, split.logit_cols)
    entries = []
    if shape.decode_rows:
        entries += _moved(split, Part.LOGITS, ROWS_TO_LOGITS, shape.decode_rows * model.embed_dim, held, wanted, 1.0)
    if shape.prefill_slots:
        embed, tokens = model.embed_dim // split.ways(split.between), shape.prefill_tokens // split.ways(split.t)
        flops = 2.0 * shape.prefill_slots * tokens * embed
        passed = tokens * embed * split.act_bytes
        if not split.pricing.program.per_prompt_attention:
            # The plain program picks the rows by a product with ones and zeros; none of it is useful work.
            entries.append(
                split.pricing.product(PICK, Part.LOGITS, 1, flops, 0.0, activation_bytes=passed, shape=(shape.prefill_slots, tokens, embed))
            )
        if split.t:
            num_bytes = shape.prefill_slots * embed * split.act_bytes
            dtype = split.act_dtype.value
            entries.append(split.pricing.collective(LAST_TOKENS, Part.LOGITS, 1, Op.ALL_REDUCE, split.t, num_bytes, dtype))
        elements = shape.prefill_slots * model.embed_dim
        here = Split(cols=split.w_stored if split.logit_cols else split.between)  # what the table splits is sliced, for nothing
        entries += _moved(split, Part.LOGITS, LAST_TO_LOGITS, elements, here, Split(cols=split.logit_cols), 1.0)
    return entries


def _choice(split: StepSplit, rows: int, useful: float) -> list[Entry]:
    """Selection over a split vocabulary, and the tokens of all decode lanes on every device."""
    shape, axes = split.shape, split.w_stored
    local = split.model.padded_vocab_size // split.ways(axes)
    passes = 3 + (2 * _BITS if shape.sampling else 0)
    entries = [split.pricing.traffic(READ_LOGITS, Part.SAMPLING, 1, passes * rows * local * _F32)]
    if shape.constrained:  # a bit per logit, which is read and written
        masked = ceil_div(local, _MASK_BITS) * _MASK_BITS // 8 + 2 * local * _F32
        entries.append(split.pricing.traffic(MASKS, Part.SAMPLING, 1, rows * masked))
    if axes:
        floats = _GREEDY_F32 + (_SAMPLING_F32 if shape.sampling else 0)
        ints = _GREEDY_INT32 + (_SAMPLING_INT32 if shape.sampling else 0)
        for count, dtype in ((floats, "f32"), (ints, "int32")):
            entries.append(split.pricing.collective(CHOOSE, Part.SAMPLING, count, Op.ALL_REDUCE, axes, rows * _F32, dtype, useful))
    if split.replica and shape.decode_rows:
        for dtype in ("int32", "f32"):
            entry = split.pricing.collective(CHOSEN, Part.SAMPLING, 1, Op.ALL_GATHER, split.replica, shape.decode_rows * _F32, dtype)
            entries.append(entry)
    return entries


def _moved(split: StepSplit, part: Part, item: Item, elements: int, source: Split, target: Split, useful: float) -> list[Entry]:
    return [
        split.pricing.collective(item, part, 1, op, axes, count * split.act_bytes, split.act_dtype.value, useful)
        for op, axes, count in split.moves(elements, source, target)
    ]
