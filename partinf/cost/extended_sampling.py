"""Entries of a step whose rows use all of extended sampling: penalties, alternatives, log-probabilities of prompts.

Penalties and biases are split over the vocabulary as the logits are and exchange nothing. Of the alternatives every device sends its own
most likely entries. The rows of a prompt pass the logits a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from partinf.cost.items import ALTERNATIVES, CHOSEN, COUNTS, PROMPT_TO_LOGITS, SCORE, SCORES
from partinf.cost.ledger import Entry, Op, Part
from partinf.cost.movement import Split
from partinf.cost.split import StepSplit
from partinf.foundation.limits import TOP_LOGPROBS

_F32 = 4
_SCORED_ROWS = 128  # rows of a prompt whose logits exist at once
_COUNTED_BYTES = 4 + 1 + 4  # per vocabulary entry of a slot: times generated, in the prompt, bias

LogitsOf = Callable[[StepSplit, int, int, float], list[Entry]]
"""(split, rows, count, useful share) → norm, logits and their way into V, so many times."""


def extended_entries(split: StepSplit, rows: int, useful: float, logits_of: LogitsOf) -> list[Entry]:
    """What extended sampling adds to the choice of tokens for `rows` rows."""
    axes, model = split.w_stored, split.model
    vocab = model.padded_vocab_size // split.ways(axes)
    entries = [split.pricing.traffic(COUNTS, Part.SAMPLING, 1, rows * vocab * (_COUNTED_BYTES + _F32))]
    sent = min(TOP_LOGPROBS, vocab)
    kept = min(TOP_LOGPROBS, sent * split.ways(axes))
    for dtype in ("int32", "f32"):
        if axes:
            num_bytes = rows * sent * split.ways(axes) * _F32
            entries.append(split.pricing.collective(ALTERNATIVES, Part.SAMPLING, 1, Op.ALL_GATHER, axes, num_bytes, dtype, useful))
        if split.replica and split.shape.decode_rows:
            num_bytes = split.shape.decode_rows * kept * _F32
            entries.append(split.pricing.collective(CHOSEN, Part.SAMPLING, 1, Op.ALL_GATHER, split.replica, num_bytes, dtype))
    return entries + (_prompt_entries(split, logits_of) if split.shape.prefill_tokens else [])


def _prompt_entries(split: StepSplit, logits_of: LogitsOf) -> list[Entry]:
    """Log-probabilities of prompt tokens: to the split of the logits, logits chunk by chunk, five reductions over V each, and back.

    Three are those of a token's log-probability, two find the likeliest token in its place.
    """
    tokens, axes = split.shape.prefill_tokens, split.w_stored
    held, wanted = Split(split.t, split.between), Split(split.replica, split.logit_cols)
    entries = [
        split.pricing.collective(PROMPT_TO_LOGITS, Part.LOGITS, 1, op, over, count * split.act_bytes, split.act_dtype.value)
        for op, over, count in split.moves(tokens * split.model.embed_dim, held, wanted)
    ]
    rows = tokens // split.ways(split.replica)
    size = max(count for count in range(1, _SCORED_ROWS + 1) if rows % count == 0)
    entries += logits_of(split, size, rows // size, split.shape.useful)
    if axes:
        for dtype, count in (("f32", 4), ("int32", 1)):
            times = count * rows // size
            entries.append(split.pricing.collective(SCORE, Part.SAMPLING, times, Op.ALL_REDUCE, axes, size * _F32, dtype))
    if split.replica:
        for dtype, count in (("f32", 2), ("int32", 1)):
            num_bytes = tokens * _F32
            entries.append(split.pricing.collective(SCORES, Part.SAMPLING, count, Op.ALL_GATHER, split.replica, num_bytes, dtype))
    return entries
