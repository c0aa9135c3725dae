"""Fit v4's constants to the measured columns and write results.json.

    python -m experiments.calibrate_v4.fit

The HBM share comes from one difference: bf16 weights instead of int8 make a decode step 8.4 ms longer, and little but weight traffic
changes. The links are taken at their stated rate. The two other constants minimise the root mean square of the errors of both things that
the columns state, logarithms of times and shares of peak (MFU), by a search that halves its steps. No constant applies to one column only.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from experiments.calibrate_v4.measured import BF16_STEP, COLUMNS, DECODED, INT8_STEP, Column, mfu, paper_layout, predict
from partinf.cost.calibration import Calibration, calibration_for
from partinf.cost.ledger import EntryKind, Part
from partinf.cost.pricing import Pricing
from partinf.cost.program import LOOPED
from partinf.hardware.chips import chips
from partinf.hardware.slices import parse_slice
from partinf.layout import PHASES
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.evaluate import Evaluator, heads_for
from partinf.workload import DType, Workload

FITTED = ("matmul_efficiency", "looped_hop_seconds")
# A collective that is one operation, and a layer's small operations, take what they take on v5e, where both were traced.
TRACED = ("hop_seconds", "collective_seconds", "layer_seconds")
START = Calibration("v4", 0.8, 1.0, 1.0, 0.0, True, 0.0, "", hides_memory=False, looped_hop_seconds=4e-6)
START = replace(START, **{key: getattr(calibration_for(chips()["v5e"]), key) for key in TRACED})


def hbm_share() -> float:
    """Extra weight bytes of bf16 over the extra time, as a share of 1.2 TB/s."""
    decode = COLUMNS[1]
    extra = predict(replace(decode, weights=DType.BF16), START).weight_bytes - predict(decode, START).weight_bytes
    return extra / 1.2e12 / (BF16_STEP - INT8_STEP)


def errors(constants: Calibration, columns: tuple[Column, ...]) -> list[float]:
    """Logarithms of predicted over measured time, and differences in MFU: both are stated, each rounded by itself."""
    found = []
    for column in columns:
        seconds = predict(column, constants).seconds
        found += [math.log(seconds / column.seconds), mfu(column, seconds) - column.mfu]
    return found


def loss(constants: Calibration, columns: tuple[Column, ...]) -> float:
    found = errors(constants, columns)
    return math.sqrt(sum(e * e for e in found) / len(found))


def fit(columns: tuple[Column, ...] = COLUMNS, start: Calibration = START, fitted: tuple[str, ...] = FITTED) -> Calibration:
    """A pattern search over the logarithms of the fitted constants."""
    best = replace(start, hbm_share=round(hbm_share(), 3))
    value, step = loss(best, columns), 0.2
    while step > 5e-4:
        trials = [replace(best, **{key: getattr(best, key) * factor}) for key in fitted for factor in (1 + step, 1 / (1 + step))]
        trials += [
            replace(best, **{first: getattr(best, first) * a, second: getattr(best, second) * b})
            for first in fitted
            for second in fitted
            if first < second
            for a in (1 + step, 1 / (1 + step))
            for b in (1 + step, 1 / (1 + step))
        ]
        found = min(((loss(trial, columns), trial) for trial in trials if trial.matmul_efficiency <= 1), key=lambda pair: pair[0])
        if found[0] < value:
            value, best = found
        else:
            step /= 2
    return best


def checks(constants: Calibration) -> dict[str, dict[str, float]]:
    """Figures of the paper's text that the fit has not seen."""
    low, high = COLUMNS[1], COLUMNS[3]
    serial = predict(replace(high, serial=True), constants).seconds / predict(high, constants).seconds - 1
    shares = {}
    for context in (8192, 32768):
        ledger = predict(replace(high, batch=256, context=context), constants)
        core = ledger.of(kind=EntryKind.ATTENTION).seconds
        around = ledger.of(part=Part.ATTENTION, kind=EntryKind.COLLECTIVE)
        moved = sum(e.exposed_seconds for e in around.entries if e.item.group == "decode")
        shares[context] = (core + moved) / ledger.seconds
    prefill, decode = predict(replace(COLUMNS[2], context=1984), constants).seconds, predict(high, constants).seconds
    overall = 2 * 540e9 * 512 * 2048 / (64 * 275e12 * (prefill + 64 * decode))
    return {
        "bf16 decode at batch 64, ms": {"measured": 36.9, "predicted": 1e3 * predict(replace(low, weights=DType.BF16), constants).seconds},
        "serial block, extra decode time": {"measured": 0.14, "predicted": serial},
        "offline 1984 in, 64 out, MFU": {"measured": 0.73, "predicted": overall},
        "attention share at context 8192": {"measured": 0.08, "predicted": shares[8192]},
        "attention share at context 32768": {"measured": 0.31, "predicted": shares[32768]},
    }


def choices() -> dict[str, dict[str, object]]:
    """Where the planner puts the layout that was run, among all role assignments of the same slice; slower than the first by `gap`."""
    found = {}
    for column in COLUMNS:
        length = column.context if column.phase == "prefill" else 0
        context = None if length else column.context
        workload = Workload(column.batch, length, context_len=context, phase=column.phase, weights=column.weights)
        report = search(load_model_config(column.model), parse_slice(column.slice), workload, program=LOOPED)
        ffn = "wg-xyz" if column.gather else "ws-2d"
        ranked = [(c.main.ffn, c.main.attention) for c in report.candidates]
        place = ranked.index((ffn, column.attention))
        mine = report.candidates[place]
        kinds = list(dict.fromkeys(ranked))
        found[column.name] = {
            "run": f"{ffn}, {column.attention}",
            "first": f"{report.best.main.ffn}, {report.best.main.attention}",
            "first_layout": report.best.name,
            "place_among_kinds": kinds.index((ffn, column.attention)) + 1,
            "gap": mine.score / report.best.score - 1,
            "tie": mine.tie_with_best,
        }
    return found


def serving() -> dict[str, dict[str, object]]:
    """The same for the two low-latency columns of a model together: one prompt prefilled, then decoded in a batch, over one storage.

    A layout that copies weights for the sake of a single prompt is paid for by every decode step. `gap` is of the whole request;
    `prefill_gap` and `decode_gap` are those of the steps within the storage that was chosen.
    """
    found = {}
    for prefill, decode in ((COLUMNS[0], COLUMNS[1]), (COLUMNS[4], COLUMNS[5])):
        model, slice_ = load_model_config(decode.model), parse_slice(decode.slice)
        workload = Workload(decode.batch, prefill.context, DECODED, decode.context, weights=decode.weights, prefill_batch=prefill.batch)
        report = search(model, slice_, workload, program=LOOPED)
        best = report.best
        evaluator = Evaluator(model, Pricing(slice_, report.calibration, program=LOOPED), workload)
        mine = paper_layout(replace(decode, attention="batch"), prefill.attention)
        padded = heads_for(model, mine, slice_.axis_sizes)
        steps = {label: evaluator.price(mine, label, padded or 0).seconds for label in PHASES}
        steps["prefill"] += evaluator.coupling(mine, padded or 0).seconds
        first = {result.name: result for result in best.phases}
        found[decode.name.split(" ")[0]] = {
            "run": "prefill ws-2d over heads, decode ws-2d over batch",
            "first": best.name,
            "seconds": {label: result.step_seconds for label, result in first.items()},
            "seconds_as_run": steps,
            "gap": (steps["prefill"] + DECODED * steps["decode"]) / best.score - 1,
            "prefill_gap": steps["prefill"] / first["prefill"].step_seconds - 1,
            "decode_gap": steps["decode"] / first["decode"].step_seconds - 1,
        }
    return found


def left_out() -> dict[str, float]:
    """Error of each column under constants fitted without it: whether the fit generalises."""
    found = {}
    for column in COLUMNS:
        constants = fit(tuple(other for other in COLUMNS if other is not column))
        found[column.name] = predict(column, constants).seconds / column.seconds - 1
    return found


def main() -> None:
    constants = fit()
    rows = []
    for column in COLUMNS:
        seconds = predict(column, constants).seconds
        rows.append(
            {
                "column": column.name,
                "measured_seconds": column.seconds,
                "predicted_seconds": seconds,
                "error": seconds / column.seconds - 1,
                "measured_mfu": column.mfu,
                "predicted_mfu": mfu(column, seconds),
            }
        )
    sizes = sorted(abs(row["error"]) for row in rows)
    result = {
        "constants": {key: getattr(constants, key) for key in ("hbm_share", "collective_factor", *FITTED, *TRACED)},
        "median_error": (sizes[3] + sizes[4]) / 2,
        "largest_error": sizes[-1],
        "columns": rows,
        "checks": checks(constants),
        "errors_when_left_out": left_out(),
        "free_link_factor": fit(fitted=(*FITTED, "collective_factor")).collective_factor,
        "choices_with_the_shipped_constants": choices(),
        "choices_when_serving": serving(),
    }
    Path(__file__).with_name("results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
