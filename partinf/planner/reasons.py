"""Why a candidate won, in one or two sentences: what its step spends its time on, and how much slower the nearest other layouts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from partinf.cost.ledger import EntryKind, Ledger
from partinf.foundation.units import readable_seconds
from partinf.hardware.slices import Link, Slice
from partinf.layout import Role
from partinf.planner.results import Candidate


def why(slice_: Slice, candidates: Sequence[Candidate], candidate: Candidate) -> str:
    """What the step of one of the candidates spends its time on, and how much slower the nearest other kinds of layout are.

    Args:
        candidates: in order, so that the first of a kind is its best.
    """
    main = candidate.main
    parts = _shares(main.ledger)
    spent = ", ".join(f"{name} {share:.0%}" for name, share in parts[:3])
    text = f"A {main.name} step takes {readable_seconds(main.step_seconds)}: {spent}."
    for kind, words in (("ffn", "The best {} layout"), ("attention", "The best layout with {}")):
        mine = getattr(main, kind)
        rival = next((c for c in candidates if getattr(c.main, kind) != mine), None)
        if rival is not None:
            other = getattr(rival.main, kind)
            named = _UNNAMED if other == "other" else words.format(_ATTENTION.get(other, other))
            text += f" {named} {_compared(candidate, rival)}."
    return text + _between_stages(slice_, candidates, candidate)


def why_experts(candidate: Candidate, others: Mapping[str, Candidate | str]) -> str:
    """How experts are split, what a device is expected to get of them, and how much slower other ways to split them are; empty for a model
    without experts.

    Args:
        others: the same layout with experts split otherwise, or why that is impossible, by what they are called.
    """
    routed = next((entry.routed for entry in candidate.main.ledger.entries if entry.routed is not None), None)
    if routed is None:
        return ""
    text = f" Expected per layer and device: {_mean(routed.hit)} experts read for {_mean(routed.rows)} rows"
    text += f", on the most loaded device {_mean(routed.most_hit)} for {_mean(routed.most_rows)}"
    compared = ", ".join(
        f"{name} is impossible ({other})" if isinstance(other, str) else f"{name} {_compared(candidate, other)}"
        for name, other in others.items()
    )
    return f"{text}; {compared}." if compared else f"{text}."


def _mean(count: float) -> str:
    return f"{count:.3g}" if count < 100 else f"{count:,.0f}"


def _compared(candidate: Candidate, rival: Candidate) -> str:
    """How much slower a rival is and where, or that it does not fit: what follows the rival's name in a sentence."""
    if not rival.fits:
        return f"does not fit ({rival.memory.total / 1e9:.1f} GB per device)"
    slower = rival.score / candidate.score - 1
    tie = ", a tie" if rival.tie_with_best and candidate.tie_with_best else ""
    words = f"is {abs(slower):.1%} {'slower' if slower >= 0 else 'faster'}{tie}"
    return f"{words} ({_difference(candidate.main.ledger, rival.main.ledger)})"


def _between_stages(slice_: Slice, candidates: Sequence[Candidate], candidate: Candidate) -> str:
    """How much slower other roles of the network between slices, or of the axes of pipeline stages, are."""
    roles = dict(candidate.layout.storage)
    axes = [axis.name for axis in slice_.axes if axis.size > 1 and (axis.link is Link.DCN or roles[axis.name] is Role.STAGE)]
    text = ""
    for axis in axes:
        others = []
        for role in Role:
            same = (c for c in candidates if dict(c.layout.storage)[axis] is role)
            rival = None if role is roles[axis] else next(same, None)
            if rival is not None:
                others.append(f"{_AS[role]} {_compared(candidate, rival)}")
        if others:
            text += f" Axis {axis} splits {_SPLITS[roles[axis]]}; {', '.join(others)}."
    return text


_LEAST, _LEAST_SHARE = 1e-6, 0.05  # seconds, and a share of the largest difference: a smaller one is not worth a word
_UNNAMED = "The best layout with unnamed FFN roles"
_ATTENTION = {
    "heads": "attention over heads",
    "batch": "attention over the batch",
    "sequence": "attention along the context",
    "mixed": "mixed attention roles",
}
_SPLITS = {Role.EMBED: "d_model", Role.FFN: "d_ff and heads", Role.REPLICA: "the batch", Role.STAGE: "the layers into stages"}
_AS = {
    Role.EMBED: "splitting d_model over it",
    Role.FFN: "splitting d_ff and heads over it",
    Role.REPLICA: "copying the weights over it",
    Role.STAGE: "splitting the layers over it",
}


def _difference(mine: Ledger, other: Ledger) -> str:
    """Where another step spends more time and where less, in milliseconds."""
    mine_by, other_by = _by_kind(mine), _by_kind(other)
    changes = sorted(((other_by[name] - mine_by[name], name) for name in mine_by), key=lambda pair: -abs(pair[0]))
    least = max(_LEAST, _LEAST_SHARE * abs(changes[0][0]))
    largest = [pair for pair in changes if abs(pair[0]) >= least] or changes[:1]
    return ", ".join(f"{name} {seconds * 1e3:+.3g} ms" for seconds, name in largest[:2])


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
