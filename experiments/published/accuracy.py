"""Every published row: the planner, the proof where an experiment holds one, and the measurement; per chip the median and the worst.

python -m experiments.published.accuracy        # prints, draws accuracy.png, writes results.json and both tables (docs, README)
python -m experiments.published.accuracy --fit  # fits again what is fitted, and predicts each half from the other (minutes)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.published.fit import engines, engines_held_out, fit, held_out, summary, timed
from experiments.published.rows import Engine, Row, least, predicted, rows, unpriced
from experiments.results import place, read, write

HERE = Path(__file__).parent
STEPS = ("decode", "prefill")


def figures(row: Row, known: dict[str, Engine], proofs: dict[str, float]) -> dict[str, Any]:
    """One row of the report."""
    seconds, proof = predicted(row, engines=known), proofs.get(f"{row.set}: {row.what}, {row.label}")
    found: dict[str, Any] = {"set": row.set, "chip": row.chip, "what": row.what, "row": row.label, "engine": row.engine}
    found |= {"measured": row.seconds, "planner": seconds, "error": seconds / row.seconds - 1}
    if proof is not None:
        found |= {"proof": proof, "proof_error": proof / row.seconds - 1}
    return found | ({"least": least(row)} if row.what in STEPS else {})


def proved() -> dict[str, float]:
    """Seconds of the proofs that experiments hold: of the library's program for the paper's columns, of jax-llm-examples' for its own."""
    columns, timed_programs = (read(str(HERE.parent / name / "measure.py")) for name in ("palm_540b_on_64_v4", "timed_programs"))
    cells = {(one["copies"], one["batch"], one["context"]): one for one in timed_programs["rows"]}
    found: dict[str, float] = {}
    for row in rows():
        fields, key = row.fields, f"{row.set}: {row.what}, {row.label}"
        if "step_seconds_estimate" in columns.get(row.label, {}):
            found[key] = columns[row.label]["step_seconds_estimate"]
        elif row.what == "decode" and "allocated" in fields:
            cell = cells.get((2 if "replica" in fields["storage"].values() else 1, fields["batch"], fields["allocated"]))
            found |= {key: cell["estimate"] / 1e3} if cell else {}
    return found


def groups(found: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by chip and kind: steps of programs, of engines, single operations."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        kind = row["engine"] or (row["what"] if row["what"] in STEPS else "operations")
        kinds.setdefault(f"{row['chip']}, {kind}", []).append(row)
    return dict(sorted(kinds.items()))


def faster(found: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Batch, and the faster of the two layouts of Llama 3.1 70B as measured and as predicted, at the smallest cache."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        if row["set"].startswith("Llama 3.1 70B") and row["what"] == "decode" and "2048" in row["row"]:
            cells.setdefault(row["row"].split(",")[0], []).append(row)
    for batch, pair in cells.items():
        yield batch, min(pair, key=lambda row: row["measured"])["set"], min(pair, key=lambda row: row["planner"])["set"]


def table(result: dict[str, Any]) -> list[str]:
    """The errors as lines of Markdown, for `docs/accuracy.md`."""
    lines = ["| what | rows | median | ninth decile | worst |", "|---|---|---|---|---|"]
    parts = {"planner": result["errors"], "proof": result["errors_of_proofs"], "left out": result["fits"]["v5e_held_out"]}
    for part, errors in (parts | {"left out ": result["fits"]["engines_held_out"]}).items():
        for name, one in errors.items():
            figures = " | ".join(f"{100 * one[key]:.1f} %" for key in ("median", "ninth_decile", "worst"))
            lines.append(f"| {part.strip()}: {name} | {one['rows']} | {figures} |")
    return lines


def draw(found: list[dict[str, Any]]) -> None:
    """Predicted over measured against measured, a colour per chip and kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(10, 5), constrained_layout=True)
    markers = "os^Dvp*Xhd<>"
    for marker, (name, members) in zip(markers, groups(found).items(), strict=False):
        panel.plot([1e3 * r["measured"] for r in members], [r["planner"] / r["measured"] for r in members], marker, ms=5, label=name)
    proofs = [row for row in found if "proof" in row]
    panel.plot([1e3 * r["measured"] for r in proofs], [r["proof"] / r["measured"] for r in proofs], "k+", ms=8, label="proof")
    panel.axhspan(1 / 1.12, 1.12, color="#3b6ea5", alpha=0.12, lw=0)
    panel.axhline(1, color="#555555", lw=0.8)
    panel.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted / measured", ylim=(0.1, 3))
    panel.set_yticks([0.1, 0.25, 0.5, 0.8, 1, 1.25, 2], ["0.1", "0.25", "0.5", "0.8", "1", "1.25", "2"])
    panel.minorticks_off()
    panel.legend(fontsize=7, ncols=2, frameon=False)
    figure.savefig(HERE / "accuracy.png", dpi=130)


def fitted() -> dict[str, Any]:
    """The fits, and what each half of the rows says of the other."""
    here = fit(timed("v5e"))
    constants = {key: getattr(here, key) for key in ("matmul_efficiency", "kernel_seconds", "row_seconds")}
    known = {name: asdict(engine) for name, engine in engines().items()}
    return {"v5e": constants, "engines": known, "v5e_held_out": held_out(), "engines_held_out": engines_held_out()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true")
    results = read(__file__, missing={})
    fits = fitted() if parser.parse_args().fit or "fits" not in results else results["fits"]
    known = {name: Engine(**values) for name, values in fits["engines"].items()}
    proofs = proved()
    found = [figures(row, known, proofs) for row in rows()]
    for row in found:
        proof = f"{row['proof'] * 1e3:10.4g}" if "proof" in row else " " * 10
        print(f"{row['set'][:34]:34} {row['what']:10} {row['row'][:46]:46} {row['measured'] * 1e3:10.4g} {row['planner'] * 1e3:10.4g} "
              f"{row['error']:+7.1%} {proof}")  # fmt: skip
    summaries = {name: summary(row["error"] for row in members) for name, members in groups(found).items()}
    proven = {name: [row["proof_error"] for row in members if "proof" in row] for name, members in groups(found).items()}
    of_proofs = {name: summary(errors) for name, errors in proven.items() if errors}
    print("\nerrors of the planner: rows, median, ninth decile, worst")
    for name, one in summaries.items():
        print(f"{name:24} {one['rows']:3} {one['median']:7.1%} {one['ninth_decile']:7.1%} {one['worst']:7.1%}")
    for name, one in of_proofs.items():
        print(f"proof: {name:24} {one['rows']:3} {one['median']:7.1%} {one['ninth_decile']:7.1%} {one['worst']:7.1%}")
    for name, one in (fits["v5e_held_out"] | fits["engines_held_out"]).items():
        print(f"held out: {name:30} {one['rows']:3} {one['median']:7.1%} {one['ninth_decile']:7.1%} {one['worst']:7.1%}")
    choices = list(faster(found))
    for batch, measured, planned in choices:
        print(f"{batch}: faster {measured}, predicted {planned}")
    for one in unpriced():
        print(f"not priced: {one['name']}: {one['note']}")
    result = {"fits": fits, "errors": summaries, "errors_of_proofs": of_proofs, "faster_layout": choices, "rows": found}
    write(__file__, result)
    place(str(HERE.parents[1] / "docs" / "accuracy.md"), "\n".join(["", *table(result)]), name="accuracy.md")
    place(__file__, "\n".join(table(result)))
    draw(found)


if __name__ == "__main__":
    main()
