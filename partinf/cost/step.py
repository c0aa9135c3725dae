"""One step in closed form: its whole ledger from roles and shapes, in a fraction of a millisecond.

The algebra is that of the partitioned program, worked out here independently of it: collective by collective what a traced step shows,
when the program that is priced is the plain one.
"""

from __future__ import annotations

from partinf.cost.attention import cache_entries, decode_entries, linear_entries, prefill_entries
from partinf.cost.ends import embedding_entries, logits_entries
from partinf.cost.experts import expert_entries
from partinf.cost.ffn import ffn_entries
from partinf.cost.ledger import Entry, Ledger
from partinf.cost.overlap import bound_fetches, hide_gathers, run_loops
from partinf.cost.split import StepSplit
from partinf.cost.stages import stage_entries


def linear_part(split: StepSplit) -> tuple[Entry, ...]:
    """What depends on storage and gathered axes alone, the same for all attention roles: layers' products, embedding, logits, stages."""
    return dense_part(split) + expert_part(split)


def expert_part(split: StepSplit) -> tuple[Entry, ...]:
    """What of that depends on the roles for experts."""
    return tuple(expert_entries(split))


def dense_part(split: StepSplit) -> tuple[Entry, ...]:
    """What of that does not."""
    layers = linear_entries(split) + ffn_entries(split)
    if split.looped:
        layers = run_loops(layers, split.pricing, split.parallel)
    layers = bound_fetches(layers, split.pricing)
    return tuple(split.pricing.dispatch() + embedding_entries(split) + layers + logits_entries(split) + stage_entries(split))


def attention_part(split: StepSplit) -> tuple[Entry, ...]:
    """What depends on attention roles: movements of queries, keys and values, and the cores."""
    return tuple(decode_entries(split) + prefill_entries(split))


def cache_part(split: StepSplit) -> tuple[Entry, ...]:
    """What depends on both phases' attention roles: the way of new keys and values to the cache."""
    return tuple(cache_entries(split))


def step_ledger(split: StepSplit) -> Ledger:
    """The whole step."""
    return hide_gathers(linear_part(split) + attention_part(split) + cache_part(split))
