"""`plan --prove`: compiled and predicted figures, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from partinf.foundation.units import figures

if TYPE_CHECKING:
    from partinf.planner.report import PlanReport
    from partinf.proof.candidates import Proofs


def show(before: PlanReport, after: PlanReport, proofs: Proofs) -> None:
    """Print the compiled and the predicted figures."""
    from partinf.foundation.terminal import plain_table, wide_console
    from partinf.planner.show.table import stored
    from partinf.proof.candidates import key, proven_seconds

    headings = ("", "planned", "weights", "phases", ">predicted ms", ">compiled ms", ">GB needed", ">")
    table = plain_table(*headings, title="Compiled candidates, ranked by the compiler's estimate")
    places = {key(candidate): index for index, candidate in enumerate(before.candidates, start=1)}
    proven = [candidate for candidate in after.candidates if key(candidate) in proofs]
    for index, candidate in enumerate(proven, start=1):
        proof = proofs[key(candidate)]
        phases = "; ".join(f"{result.name}: {result.ffn}, {result.attention}" for result in candidate.phases)
        needed = max(step.memory.needed for step in proof.steps) / 1e9
        time = figures(1e3 * proven_seconds(after, candidate, proof)) if proof.fits else ""
        cells = (figures(1e3 * candidate.score), time, f"{needed:.2f}", "" if proof.fits else "does not fit")
        table.add_row(str(index), f"#{places[key(candidate)]}", stored(candidate), phases, *cells)
    console = wide_console()
    console.print(table)
    console.print()
