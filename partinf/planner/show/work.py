"""What a step's time is spent on and how its roles read, for pictures and pages."""

from __future__ import annotations

from partinf.cost.items import What
from partinf.cost.ledger import Entry, EntryKind, Ledger
from partinf.layout import AttentionRole
from partinf.planner.results import PhaseResult

COLOURS = {
    "matmuls": "#3b6ea5",
    "attention core": "#e0a030",
    "activation collectives": "#b5483a",
    "weight gathers": "#7a4f9a",
    "other memory traffic": "#9a9a9a",
}


def by_work(ledger: Ledger) -> dict[str, float]:
    """Exposed seconds by kind of work; the kinds are the keys of `COLOURS` and sum to the step."""
    sums = dict.fromkeys(COLOURS, 0.0)
    names = {EntryKind.MATMUL: "matmuls", EntryKind.ATTENTION: "attention core", EntryKind.MEMORY: "other memory traffic"}
    for entry in ledger.entries:
        moved = "weight gathers" if entry.item.what in (What.WEIGHTS, What.SCALES) else "activation collectives"
        sums[names.get(entry.kind, moved)] += entry.exposed_seconds
    return sums


def roles_of(step: PhaseResult) -> str:
    """`ws-2d, batch xy, heads z`."""
    split = {role: "".join(step.phase.attention_axes(role)) for role in AttentionRole if role is not AttentionRole.NONE}
    return ", ".join([step.ffn, *(f"{role} {axes}" for role, axes in split.items() if axes)])


def moved_bytes(entry: Entry) -> float:
    """The payload of a collective, HBM traffic of the rest, of one occurrence."""
    return entry.bytes or entry.weight_bytes + entry.kv_bytes + entry.activation_bytes
