"""The cost model against measured serving on H100, H200 and B200: fit, halves that predict each other, results.json.

    python -m experiments.gpus_serving.measure PATH_TO_silicon_sample.csv     # 40 s, writes results.json
    python -m experiments.gpus_serving.measure --select PATH                  # writes measured.csv, the selection that the tests hold

A row's time per output token is a step that decodes all requests, the prompts of others that pass meanwhile, and what the engine takes:

    TPOT = step(n, in + out/2) + (n - 1)/(out - 1) · prompt(in) + engine + n · engine per request

The first two are the ledger of the engines' program under a chip's constants. Efficiency of products, what fp8 adds to a layer and
everything about collectives come from single operations (operations.json) and are not fitted. Fitted to whole steps are the share of HBM
and the time of a layer's small operations, one of each for H100 and H200 (the same GPU with another memory) and for B200; and two constants
of each engine.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import numpy as np
from scipy.optimize import nnls

from experiments.gpus_serving.operations import rounded
from experiments.gpus_serving.rows import SELECTION, Row, compared, read, select
from partinf.cost.calibration import Calibration, calibration_for
from partinf.cost.program import program_for
from partinf.hardware.chips import chips

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
OPERATIONS = json.loads((HERE / "operations.json").read_text())
ENGINES = ("trtllm", "vllm", "sglang")
GPUS = {"h100": ("h100", "h200"), "b200": ("b200",)}  # by GPU: the chips that have it
SHARES = tuple(round(0.70 + 0.02 * n, 2) for n in range(14))  # of HBM, that the fit tries
_SMALL = 0.05  # relative error from which a row pulls no harder


@dataclass(frozen=True)
class Fitted:
    """What was fitted.

    Attributes:
        hbm_share, layer_seconds: by GPU.
        step_seconds, request_seconds: by engine: of every step, and of every request in it.
        known: the GPUs that the rows had.
    """

    hbm_share: dict[str, float]
    layer_seconds: dict[str, float]
    step_seconds: dict[str, float]
    request_seconds: dict[str, float]
    known: frozenset[str] = frozenset()

    def of(self, row: Row) -> float:
        """Predicted seconds per output token."""
        gpu = gpu_of(row.chip)
        engine = self.step_seconds[row.engine] + row.requests * self.request_seconds[row.engine]
        return work(row, self.hbm_share[gpu]) + layers(row) * self.layer_seconds[gpu] + engine


def gpu_of(chip: str) -> str:
    """The GPU of a chip, for what does not depend on its memory."""
    return next(gpu for gpu, with_it in GPUS.items() if chip in with_it)


def layers(row: Row) -> float:
    """Layers that pass per output token, of decode and of prompts."""
    return row.config.num_layers * (1 + row.prompts_per_token)


def kernels(chip: str, kind: str, share: float = 1.0) -> Calibration:
    """The engines' kernels on a chip, as single operations show them; with a share of HBM, and nothing else."""
    found = OPERATIONS[chip]
    efficiency = found["fp8_efficiency" if kind == "fp8" else "matmul_efficiency"]
    around = {name: found["engines"][name] for name in ("collective_seconds", "collective_factor", "hop_seconds")}
    return Calibration(
        f"{chip}, engines", efficiency, share, measured=True, error=0.0, source="operations.json", switch_rings=True, **around
    )


@cache
def work(row: Row, share: float) -> float:
    """Seconds per output token of a row's products, cores and collectives, and of what fp8 adds to them."""
    overhead = layers(row) * OPERATIONS[row.chip]["fp8_layer_seconds"] if row.type == "fp8" else 0.0
    return row.work(kernels(row.chip, row.type, share)) + overhead


def fit(rows: Sequence[Row]) -> Fitted:
    """The constants that meet these rows: least sums of relative errors, by shares of HBM one GPU after the other."""
    shares = dict.fromkeys(GPUS, 0.9)
    for _ in range(2):
        for gpu in GPUS:
            if any(gpu_of(row.chip) == gpu for row in rows):
                shares[gpu] = min(SHARES, key=lambda share: _loss(rows, _linear(rows, shares | {gpu: share})))
    return _linear(rows, shares)


def _loss(rows: Sequence[Row], fitted: Fitted) -> float:
    return sum(abs(math.log(fitted.of(row) / row.tpot)) for row in rows)


def _linear(rows: Sequence[Row], shares: dict[str, float]) -> Fitted:
    """The other constants, of which a prediction is a sum: none below 0, errors beyond `_SMALL` weighed by their size."""
    gpus = list(GPUS)
    columns = [*gpus, *ENGINES, *(f"{engine}, each" for engine in ENGINES)]
    terms = np.zeros((len(rows), len(columns)))
    base = np.array([work(row, shares[gpu_of(row.chip)]) for row in rows])
    for i, row in enumerate(rows):
        terms[i, columns.index(gpu_of(row.chip))] = layers(row)
        terms[i, columns.index(row.engine)] = 1.0
        terms[i, columns.index(f"{row.engine}, each")] = row.requests
    measured = np.array([row.tpot for row in rows])
    unit = 1e-5
    weights, values = np.ones(len(rows)), np.zeros(len(columns))
    for _ in range(20):
        scale = weights / measured
        values = unit * nnls(unit * terms * scale[:, None], (measured - base) * scale)[0]
        errors = np.abs((base + terms @ values) / measured - 1)
        weights = 1 / np.sqrt(np.maximum(errors, _SMALL))
    found = {name: float(value) for name, value, seen in zip(columns, values, terms.any(axis=0), strict=True) if seen}

    def group(names: Sequence[str]) -> dict[str, float]:
        """Those of these columns; what no row has takes the mean of the others."""
        known = [found[name] for name in names if name in found]
        return {name.removesuffix(", each"): found.get(name, mean(known)) for name in names}

    each = group([f"{engine}, each" for engine in ENGINES])
    return Fitted(dict(shares), group(gpus), group(ENGINES), each, frozenset(gpus) & found.keys())


def summary(pairs: Iterable[tuple[Row, float]]) -> dict[str, Any]:
    """Predicted over measured of rows with their predictions: how many, median, deciles, extremes, median error."""
    ratios = sorted(seconds / row.tpot for row, seconds in pairs)
    tenths = quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios * 9
    return {
        "rows": len(ratios),
        "median": median(ratios),
        "P10": tenths[0],
        "P90": tenths[-1],
        "least": ratios[0],
        "most": ratios[-1],
        "median_error": median(abs(math.log(ratio)) for ratio in ratios),
    }


def grouped(rows: Sequence[Row], predicted: Callable[[Row], float], by: Callable[[Row], str]) -> dict[str, Any]:
    """Summaries of the rows, by what they have in common."""
    names = sorted({by(row) for row in rows})
    return {name: summary((row, predicted(row)) for row in rows if by(row) == name) for name in names}


HALVES: dict[tuple[str, str], Callable[[Row], bool]] = {
    ("1 and 4 GPUs", "2 and 8 GPUs"): lambda row: row.ways in (1, 4),
    ("Qwen 3 32B", "Llama 3.1 8B and 70B"): lambda row: row.model == "qwen-3-32b",
    ("up to 16 requests", "more than 16 requests"): lambda row: row.requests <= 16,
}


def left_out(rows: Sequence[Row]) -> dict[str, tuple[Fitted, list[Row]]]:
    """What is fitted to each half of the rows, and those of the other half whose GPU it knows; and H100 and H200 from each other."""
    halves: dict[str, tuple[list[Row], list[Row]]] = {}  # seen, unseen
    for (first, second), inside in HALVES.items():
        one, other = [row for row in rows if inside(row)], [row for row in rows if not inside(row)]
        halves |= {f"{second}, fitted to {first}": (one, other), f"{first}, fitted to {second}": (other, one)}
    for chip, other_chip in (("h100", "h200"), ("h200", "h100")):
        of_chip = {name: [row for row in rows if row.chip == name] for name in (chip, other_chip)}
        halves[f"{other_chip}, fitted to {chip}"] = of_chip[chip], of_chip[other_chip]
    fits = {name: (fit(seen), unseen) for name, (seen, unseen) in halves.items()}
    return {name: (fitted, [row for row in unseen if gpu_of(row.chip) in fitted.known]) for name, (fitted, unseen) in fits.items()}


def intervals(fits: Iterable[Fitted]) -> dict[str, dict[str, list[float]]]:
    """What is left open of the fitted constants, by GPU: what single operations say, and the least and most that a half does."""
    found: dict[str, dict[str, list[float]]] = {}
    known = list(fits)
    for gpu in GPUS:
        found[gpu] = {}
        for name in ("hbm_share", "layer_seconds"):
            values = [getattr(fitted, name)[gpu] for fitted in known if gpu in fitted.known] + [OPERATIONS[gpu][name]]
            found[gpu][name] = [min(values), max(values)]
    return found


def by_chip(pairs: Sequence[tuple[Row, float]]) -> dict[str, Any]:
    """Summaries of rows with their predictions."""
    return {chip: summary(pair for pair in pairs if pair[0].chip == chip) for chip in sorted({row.chip for row, _ in pairs})}


def library(row: Row) -> float:
    """Seconds per output token by the library's constants and program: its collectives are NCCL's, and no engine takes time."""
    chip = chips()[row.chip]
    return row.work(calibration_for(chip), program_for(chip))


def assumed(row: Row) -> float:
    """The same by the constants of a GPU of which nothing was measured."""
    chip = chips()[row.chip]
    return row.work(calibration_for(replace(chip, name=chip.family)), program_for(chip))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, metavar="PATH", help="silicon_sample.csv")
    parser.add_argument("--select", action="store_true", help="write the selection that the tests hold, and nothing else")
    args = parser.parse_args()
    if args.select:
        SELECTION.write_text(select(args.path))
        return 0
    rows, why = compared(read(args.path))
    fitted, fits = fit(rows), left_out(rows)
    halves = {name: [(row, seen.of(row)) for row in unseen] for name, (seen, unseen) in fits.items()}
    constants = {name: value for name, value in vars(fitted).items() if name != "known"}
    results = {
        "rows": len(rows),
        "not compared": {", ".join(campaign): reason for campaign, reason in why.items()},
        "constants": constants,
        "intervals": intervals(seen for seen, _ in fits.values()),
        "fit": {
            "by chip": grouped(rows, fitted.of, lambda row: row.chip),
            "by campaign": grouped(rows, fitted.of, lambda row: ", ".join(row.campaign)),
            "by GPUs": grouped(rows, fitted.of, lambda row: f"{row.chip}, {row.ways}"),
            "by requests": grouped(rows, fitted.of, lambda row: f"{row.chip}, {row.requests:3d}"),
        },
        "left out": {name: by_chip(pairs) for name, pairs in halves.items()},
        "left out, together": by_chip([pair for pairs in halves.values() for pair in pairs]),
        "the library's program, no engine": {
            name: grouped(rows, predicted, lambda row: row.chip) | grouped(rows, predicted, lambda row: f"{row.chip}, {row.ways}")
            for name, predicted in (("constants of the chip", library), ("constants of an unknown GPU", assumed))
        },
    }
    RESULTS.write_text(json.dumps(rounded(results), indent=1) + "\n")
    for name, pairs in halves.items():
        print(f"{name:55s}", {chip: f"{one['median']:.3f} ({one['P10']:.2f} to {one['P90']:.2f})" for chip, one in by_chip(pairs).items()})
    print(json.dumps(rounded(constants)))
    for name in ("by chip", "by campaign", "by GPUs"):
        for group, one in results["fit"][name].items():
            print(f"{group:45s} {one['rows']:4d} rows, median {one['median']:.3f}, {one['P10']:.2f} to {one['P90']:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
