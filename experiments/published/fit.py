"""What of v5e's constants, and of the engines', is fitted to published steps, and how well each half of them predicts the other.

Fitted on v5e: the rate of products, and what the kernel of decode takes for a row (its trace gives it at 16 rows). Everything else was read
from traces or from single operations and is fixed. Fitted of an engine: what a layer and a row of a layer take in addition to its program.
Held out are whole layouts, batches, cache sizes, and models, never random cells.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace

from experiments.published.rows import Engine, Row, predicted, rows
from partinf.cost.calibration import Calibration, calibration_for
from partinf.hardware.chips import chips

TRACED_ROWS, TRACED_KERNEL = 16, 17.6e-6  # of the kernel in the trace
PREFILL_WEIGHT = 0.25  # a decode step tells more of the constants than a prefill, which is mostly links and products


def made(efficiency: float, row: float) -> Calibration:
    """The constants of v5e with these two."""
    kernel = TRACED_KERNEL - TRACED_ROWS * row
    return replace(calibration_for(chips()["v5e"]), matmul_efficiency=efficiency, row_seconds=row, kernel_seconds=kernel)


START = (0.75, 0.6e-6)
HIGHEST = (1.0, TRACED_KERNEL / TRACED_ROWS)


def fit(seen: Sequence[Row]) -> Calibration:
    """The constants under which the errors of these rows are least."""

    def loss(values: tuple[float, ...]) -> float:
        constants = made(*values)
        return sum(math.log(predicted(row, constants) / row.seconds) ** 2 * (1 if row.what == "decode" else PREFILL_WEIGHT) for row in seen)

    return made(*descend(loss, START, HIGHEST))


def fit_engine(seen: Sequence[Row]) -> Engine:
    """The engine's constants under which the errors of these rows are least."""

    def loss(values: tuple[float, ...]) -> float:
        engine = Engine(*values)
        return sum(math.log(predicted(row, engines={row.engine: engine}) / row.seconds) ** 2 for row in seen)

    return Engine(*descend(loss, (30e-6, 1e-6), (math.inf,) * 2))


def descend(loss: Callable[[tuple[float, ...]], float], start: tuple[float, ...], highest: tuple[float, ...]) -> tuple[float, ...]:
    """Values above 0 under which the loss is least, by a search along one after the other that halves its steps."""
    best, value, step = start, loss(start), 0.2
    while step > 2e-3:
        before = value
        for i in range(len(start)):
            for factor in (1 + step, 1 / (1 + step)):
                trial = (*best[:i], min(best[i] * factor, highest[i]), *best[i + 1 :])
                found = loss(trial)
                if found < value:
                    value, best = found, trial
        if value > before * (1 - 1e-4):
            step /= 2
    return best


def timed(chip: str, engine: str = "") -> tuple[Row, ...]:
    """The steps of a chip that were timed without an engine, or with this one."""
    return tuple(row for row in rows() if row.chip == chip and row.what in ("decode", "prefill") and row.engine == engine)


def halves(seen: Sequence[Row]) -> dict[str, tuple[list[Row], list[Row]]]:
    """The ways in which steps of v5e fall into two: layouts, batches, cache sizes."""
    tests: dict[str, Callable[[Row], bool]] = {
        "layouts": lambda row: "copies" in row.set,
        "batches": lambda row: row.fields["batch"] in (16, 64),
        "cache sizes": lambda row: row.fields["allocated"] > 2048,
    }
    return {name: ([r for r in seen if not test(r)], [r for r in seen if test(r)]) for name, test in tests.items()}


def held_out() -> dict[str, dict[str, float]]:
    """Errors of v5e's decode steps under constants fitted to the other half, by what was held out."""
    found = {}
    for name, (one, other) in halves(timed("v5e")).items():
        for seen, unseen, way in ((one, other, "second half"), (other, one, "first half")):
            here = fit(seen)
            decode = [row for row in unseen if row.what == "decode"]
            found[f"{name}, {way}"] = summary(predicted(row, here) / row.seconds - 1 for row in decode)
    return found


def engines_held_out() -> dict[str, dict[str, float]]:
    """Errors of an engine's rows of one model under constants fitted to its rows of the other, and of all of them together."""
    found = {}
    for name in engines():
        seen, together = timed("v6e", name), []
        for model in sorted({row.fields["model"] for row in seen}):
            engine = fit_engine([row for row in seen if row.fields["model"] != model])
            errors = [predicted(row, engines={name: engine}) / row.seconds - 1 for row in seen if row.fields["model"] == model]
            found[f"{name}, {model}"] = summary(errors)
            together += errors
        found[f"{name}, each from the other"] = summary(together)
    return found


def engines() -> dict[str, Engine]:
    """Every engine with its constants, fitted to all its rows; none of an engine that has no more rows than constants."""
    names = sorted({row.engine for row in rows() if row.engine})
    return {name: fit_engine(seen) for name in names if len(seen := timed("v6e", name)) > len(fields(Engine))}


def summary(errors: Iterable[float]) -> dict[str, float]:
    """Median, ninth decile and worst of absolute errors, and their number."""
    sizes = sorted(map(abs, errors))
    ninth = sizes[min(len(sizes) - 1, math.ceil(0.9 * len(sizes)) - 1)]
    return {"rows": len(sizes), "median": statistics.median(sizes), "ninth_decile": ninth, "worst": sizes[-1]}
