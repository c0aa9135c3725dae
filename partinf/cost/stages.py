"""Entries of a tick that pass between pipeline stages: activations to the next one, and the tokens that the last one chose to all.

A tick is one call: every stage runs its layers for a batch of its own. What lies before the first layer and after the last is computed
by every stage at once, so a tick takes its time once, as a step of one stage does.
"""

from __future__ import annotations

from partinf.cost.items import CHOSEN_TO_STAGES, DECODE, NEXT_STAGE, PREFILL, Item
from partinf.cost.ledger import Entry, Op, Part
from partinf.cost.movement import Split
from partinf.cost.split import StepSplit
from partinf.foundation.limits import TOP_LOGPROBS

_WORD = 4


def stage_entries(split: StepSplit) -> list[Entry]:
    """[T.t, E.between] → [T.r, E.ef] of every stage, which the next one begins its next tick with; and the chosen tokens."""
    if not split.stages:
        return []
    shape, entries = split.shape, []
    used, stored = Split(split.t, split.between), Split(split.replica, split.w_stored)
    for tokens, group in ((shape.decode_rows, DECODE), (shape.prefill_tokens, PREFILL)):
        for op, axes, count in split.moves(tokens * split.model.embed_dim, used, stored) if tokens else ():
            entries.append(_collective(split, group.leaving, op, axes, count * split.act_bytes))
    chosen = split.pricing.collective(CHOSEN_TO_STAGES, Part.STAGES, 1, Op.ALL_REDUCE, split.stages, _WORD * _chosen_words(split), "int32")
    return [*entries, _collective(split, NEXT_STAGE, Op.PERMUTE, split.stages, carried_bytes(split)), chosen]


def carried_bytes(split: StepSplit) -> int:
    """Activations on one device on their way from stage to stage; 0 for one stage."""
    if not split.stages:
        return 0
    return split.shape.num_tokens // split.ways(split.replica) * (split.model.embed_dim // split.ways(split.w_stored)) * split.act_bytes


def _collective(split: StepSplit, item: Item, op: Op, axes: tuple[str, ...], num_bytes: int) -> Entry:
    return split.pricing.collective(item, Part.STAGES, 1, op, axes, num_bytes, split.act_dtype.value, split.shape.useful)


def _chosen_words(split: StepSplit) -> int:
    """Tokens and log-probabilities of all rows; alternatives, and of prompts scores and likeliest tokens, where the program has them."""
    shape = split.shape
    rows = shape.decode_rows + shape.prefill_slots
    if not shape.extended:
        return 2 * rows
    vocab = split.model.padded_vocab_size // split.ways(split.w_stored)
    alternatives = min(TOP_LOGPROBS, min(TOP_LOGPROBS, vocab) * split.ways(split.w_stored))
    return 2 * rows * (1 + alternatives) + 3 * shape.prefill_tokens
