"""Why a candidate won, in one or two sentences: what its step spends its time on, and what the nearest other layouts would cost."""

from __future__ import annotations

from collections.abc import Sequence

from partinf.cost.ledger import EntryKind, Ledger
from partinf.hardware.slices import Link, Slice
from partinf.layout import Role
from partinf.planner.results import Candidate


def why(slice_: Slice, candidates: Sequence[Candidate], candidate: Candidate) -> str:
    """What the step of one of the candidates spends its time on, and what the nearest other kinds of layout would cost.

    Args:
        candidates: in order, so that the first of a kind is its best.
    """
    asked = candidate.asked
    parts = _shares(asked.ledger)
    spent = ", ".join(f"{name} {share:.0%}" for name, share in parts[:3])
    text = f"A {asked.name} step of {asked.step_seconds * 1e3:.4g} ms goes to {spent}."
    others = []
    for label, kind in (("FFN", "ffn"), ("attention over", "attention")):
        mine = getattr(asked, kind)
        rival = next((c for c in candidates if getattr(c.asked, kind) != mine), None)
        if rival is None:
            continue
        other = getattr(rival.asked, kind)
        if not rival.fits:
            others.append(f"{label} {other} does not fit ({rival.memory.total / 1e9:.1f} GB per device)")
        else:
            tie = "a tie; " if rival.tie_with_best and candidate.tie_with_best else ""
            reason = _difference(asked.ledger, rival.asked.ledger)
            others.append(f"{label} {other} would cost {rival.score / candidate.score - 1:+.1%} ({tie}{reason})")
    text += f" Against {asked.ffn} with attention over {asked.attention}, {' and '.join(others)}." if others else ""
    return text + _between_stages(slice_, candidates, candidate)


def _between_stages(slice_: Slice, candidates: Sequence[Candidate], candidate: Candidate) -> str:
    """What other roles of the network between slices, or of the axes of pipeline stages, would cost."""
    roles = dict(candidate.layout.storage)
    axes = [axis.name for axis in slice_.axes if axis.size > 1 and (axis.link is Link.DCN or roles[axis.name] is Role.STAGE)]
    text = ""
    for axis in axes:
        others = []
        for role in Role:
            same = (c for c in candidates if dict(c.layout.storage)[axis] is role)
            rival = None if role is roles[axis] else next(same, None)
            if rival is None:
                continue
            if not rival.fits:
                others.append(f"{_AS[role]} do not fit ({rival.memory.total / 1e9:.1f} GB per device)")
            else:
                change = _difference(candidate.asked.ledger, rival.asked.ledger)
                others.append(f"{_AS[role]} would cost {rival.score / candidate.score - 1:+.1%} ({change})")
        if others:
            text += f" Axis {axis} splits {_SPLITS[roles[axis]]}: {', '.join(others)}."
    return text


_SPLITS = {Role.EMBED: "d_model", Role.FFN: "d_ff and heads", Role.REPLICA: "the batch", Role.STAGE: "the layers into stages"}
_AS = {
    Role.EMBED: "shards of d_model there",
    Role.FFN: "tensors there",
    Role.REPLICA: "copies of the weights there",
    Role.STAGE: "stages there",
}


def _difference(mine: Ledger, other: Ledger) -> str:
    """Where another step spends more time and where less, in milliseconds."""
    mine_by, other_by = _by_kind(mine), _by_kind(other)
    changes = sorted(((other_by[name] - mine_by[name], name) for name in mine_by), key=lambda pair: -abs(pair[0]))
    return ", ".join(f"{name} {seconds * 1e3:+.3g} ms" for seconds, name in changes[:2])


def _shares(ledger: Ledger) -> list[tuple[str, float]]:
    """Shares of the step's time by what it is spent on, largest first."""
    total = ledger.seconds or 1.0
    return sorted(((name, value / total) for name, value in _by_kind(ledger).items()), key=lambda pair: -pair[1])


def _by_kind(ledger: Ledger) -> dict[str, float]:
    """Exposed seconds by what they are spent on."""
    names = {
        EntryKind.MATMUL: "matmuls",
        EntryKind.ATTENTION: "attention",
        EntryKind.COLLECTIVE: "collectives",
        EntryKind.MEMORY: "other memory traffic",
    }
    sums = dict.fromkeys(names.values(), 0.0)
    for entry in ledger.entries:
        sums[names[entry.kind]] += entry.exposed_seconds
    return sums
