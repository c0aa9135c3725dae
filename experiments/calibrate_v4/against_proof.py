"""Where the fitted constants and the compiled program part: decode of PaLM 540B on 64 v4 chips as this library runs it, entry by entry.

    python -m experiments.calibrate_v4.against_proof   # reads results.json of palm_540b_on_64_v4, writes against_proof.json and its table

The cost model prices the library's program (`tiled`) twice: at the fitted time of a ring's step, and at the 1 µs with which a proof prices
the hops of the collectives that it finds in the compiled text.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.palm_540b_on_64_v4 import measure
from experiments.palm_540b_on_64_v4.measure import CASES, Case, plan_of
from experiments.results import place, read, write
from partinf.buckets import split_of
from partinf.cost.calibration import Calibration, calibration_for
from partinf.cost.ledger import EntryKind, Ledger
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED
from partinf.cost.step import step_ledger

NAMES = ("540B low-latency decode", "540B high-throughput decode")


def ledger(case: Case, constants: Calibration) -> Ledger:
    """The step of a case as the library runs it."""
    plan, bucket = plan_of(case)
    return step_ledger(split_of(plan, bucket, Pricing(plan.slice, constants, program=TILED)))


def row(case: Case, proof: dict[str, object]) -> dict[str, float]:
    """Milliseconds of both accounts."""
    fitted = calibration_for(plan_of(case)[0].slice.chip)
    ours = ledger(case, fitted)
    hops = ledger(case, replace(fitted, hop_seconds=1e-6, collective_seconds=0.0)).of(kind=EntryKind.COLLECTIVE).seconds
    estimate = proof["estimate"]
    assert isinstance(estimate, dict)
    work = [(one["what"], one["count"] * one["seconds"]) for one in proof["work"]]  # type: ignore[attr-defined]
    products = sum(seconds for what, seconds in work if "params['layers']" in what)
    seconds = {
        "cost model": ours.seconds,
        "compiled": max(estimate["floor"], estimate["compute"] + estimate["collectives"]),
        "collectives, fitted steps": ours.of(kind=EntryKind.COLLECTIVE).seconds,
        "collectives, 1 µs hops": hops,
        "collectives, compiled": estimate["collectives"] + estimate["overlapped"],
        "of these hidden": estimate["overlapped"],
        "layers' products": sum(e.exposed_seconds for e in ours.of(kind=EntryKind.MATMUL).entries if e.count > 1),
        "layers' products, compiled": products,
        "rest": ours.seconds - ours.of(kind=EntryKind.COLLECTIVE).seconds - ours.of(kind=EntryKind.MATMUL).seconds,
        "rest, compiled": estimate["compute"] - products,
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """As Markdown, milliseconds."""
    heads = (
        "all",
        "collectives: model, 1 µs hops, compiled (hidden)",
        "layers' products: model, compiled",
        "everything else: model, compiled",
    )
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name, one in found.items():
        collectives = ", ".join(f"{one[f'collectives, {which}']:.1f}" for which in ("fitted steps", "1 µs hops", "compiled"))
        cells = [f"{one['cost model']:.3g}, {one['compiled']:.3g}", f"{collectives} ({one['of these hidden']:.1f})"]
        cells += [f"{one[part]:.1f}, {one[f'{part}, compiled']:.1f}" for part in ("layers' products", "rest")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    proofs = read(measure.__file__)
    found = {case.name: row(case, proofs[case.name]) for case in CASES if case.name in NAMES}
    write(__file__, found, "against_proof.json")
    place(__file__, table(found))
    for name, values in found.items():
        print(name, *(f"  {what:28}{value:7.1f} ms" for what, value in values.items()), sep="\n")


if __name__ == "__main__":
    main()
