"""Constants that single operations say of A100, H100, H200 and B200, from the timings of operations.csv.

    python -m experiments.gpus_serving.operations        # a second, writes operations.json

operations.csv is a selection of the per-operation tables of AIConfigurator (NVIDIA, Apache-2.0; `aiconfigurator-core` 0.12.0,
`systems/data/*_sxm`): products with weights at 8, 32 and 8192 rows for shapes of 8B to 70B models, cores of decode, the all-reduce kernels
of three serving engines, and NCCL's collectives. `elements` are those of the output of an all-gather and of the input of the others.

Nothing here has seen a whole step; the steps (`experiments.gpus_serving.measure`) take these constants as they are.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import nnls

from partinf.hardware.chips import chips

HERE = Path(__file__).parent
RESULTS = HERE / "operations.json"
CHIPS = ("a100-80", "h100", "h200", "b200")
ENGINES = ("trtllm", "vllm", "sglang")
_BYTES = {"bf16": 2, "fp8": 1}
_LARGE = 8192  # rows from which a product says what the matrix units reach
PRODUCTS = 4  # of a layer with an engine: queries, keys and values together; outputs; gate and up together; down


@dataclass(frozen=True)
class Timing:
    """One row of the file; `seconds` of one operation, `elements` of a collective."""

    chip: str
    program: str
    operation: str
    type: str
    ways: int
    rows: int
    inputs: int
    outputs: int
    elements: int
    seconds: float

    @property
    def read(self) -> float:
        """Bytes that it reads and writes: of a product, or of a core of decode with 8 key-value heads of 128."""
        if self.operation == "decode core":
            return 2 * 2.0 * self.rows * self.inputs * 8 * 128
        return _BYTES[self.type] * self.inputs * self.outputs + 2.0 * self.rows * (self.inputs + self.outputs)

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs

    @property
    def steps(self) -> int:
        """Ways around the ring: an all-reduce is a reduce-scatter and an all-gather."""
        return 2 if self.operation == "all-reduce" else 1


@cache
def timings() -> tuple[Timing, ...]:
    """All rows of operations.csv."""
    with (HERE / "operations.csv").open() as file:
        return tuple(
            Timing(
                *(row[name] for name in ("chip", "program", "operation", "type")),
                *(int(row[name] or 0) for name in ("ways", "rows", "inputs", "outputs", "elements")),
                float(row["microseconds"]) * 1e-6,
            )
            for row in csv.DictReader(file)
        )


def _of(chip: str, operation: str, *programs: str, kind: str = "bf16") -> list[Timing]:
    return [t for t in timings() if t.chip == chip and t.operation == operation and t.program in programs and t.type == kind]


def efficiency(chip: str, kind: str = "bf16", programs: Iterable[str] = ENGINES) -> float:
    """Share of the chip's bfloat16 peak that large products reach, in the median; that of fp8 is over the same peak."""
    large = [t for t in _of(chip, "product", *programs, kind=kind) if t.rows == _LARGE]
    return median(t.flops / t.seconds for t in large) / chips()[chip].peak_bf16


def reading(chip: str, operation: str, kind: str = "bf16", programs: Iterable[str] = ENGINES) -> tuple[float, float]:
    """Seconds that an operation of few rows takes besides its bytes, and the share of the stated bandwidth at which it reads these: the
    least squares of relative errors for each engine, of which the median."""
    found = []
    for program in programs:
        few = [t for t in _of(chip, operation, program, kind=kind) if t.rows < _LARGE]
        terms = np.array([(1e-6, t.read * 1e-12) for t in few]) / np.array([[t.seconds] for t in few])
        overhead, each = nnls(terms, np.ones(len(few)))[0]
        found.append((float(overhead) * 1e-6, 1e12 / float(each) / chips()[chip].hbm_bandwidth))
    return median(overhead for overhead, _ in found), median(share for _, share in found)


def collectives(chip: str, *programs: str) -> tuple[float, float, float]:
    """Fixed seconds of a collective, seconds of each further device on the way around, and measured over modelled time of the
    bytes: the least squares of relative errors."""
    link = chips()[chip].switch_bandwidth
    found = [t for op in ("all-gather", "reduce-scatter", "all-reduce") for t in _of(chip, op, *programs)]
    terms = [(1.0, t.steps * (t.ways - 1), t.steps * 2.0 * t.elements * (t.ways - 1) / t.ways / link) for t in found]
    scaled = np.array(terms) / np.array([[t.seconds] for t in found])
    units = np.array([1e-6, 1e-6, 1.0])
    fixed, hop, factor = nnls(scaled * units, np.ones(len(found)))[0] * units
    return float(fixed), float(hop), float(factor)


def collective_errors(chip: str, *programs: str) -> list[float]:
    """Modelled over measured time of every collective of these programs."""
    fixed, hop, factor = collectives(chip, *programs)
    link = chips()[chip].switch_bandwidth
    found = [t for op in ("all-gather", "reduce-scatter", "all-reduce") for t in _of(chip, op, *programs)]
    return [(fixed + t.steps * (t.ways - 1) * (hop + factor * 2.0 * t.elements / t.ways / link)) / t.seconds for t in found]


def constants(chip: str) -> dict[str, Any]:
    """All constants of a chip, and how far the engines' kernels lie apart."""

    def collective(*programs: str) -> dict[str, float]:
        fixed, hop, factor = collectives(chip, *programs)
        errors = [abs(math.log(e)) for e in collective_errors(chip, *programs)]
        return {"collective_seconds": fixed, "hop_seconds": hop, "collective_factor": factor, "median_error": median(errors)}

    def each(figure: Any) -> list[float]:
        found = [figure(chip, programs=(engine,)) for engine in ENGINES]
        return [min(found), max(found)]

    def layer(chip: str, programs: Iterable[str] = ENGINES) -> float:
        return PRODUCTS * reading(chip, "product", programs=programs)[0] + reading(chip, "decode core", programs=programs)[0]

    found: dict[str, Any] = {
        "matmul_efficiency": efficiency(chip),
        "hbm_share": reading(chip, "product")[1],
        "core_share": reading(chip, "decode core")[1],
        "layer_seconds": layer(chip),
        "between engines": {
            "matmul_efficiency": each(efficiency),
            "hbm_share": each(lambda chip, programs: reading(chip, "product", programs=programs)[1]),
            "layer_seconds": each(layer),
        },
        "nccl": collective("nccl"),
        "engines": collective(*ENGINES),
        "each engine": {engine: collective(engine) for engine in ENGINES},
    }
    if _of(chip, "product", *ENGINES, kind="fp8"):
        overhead = [reading(chip, "product", "fp8", (e,))[0] - reading(chip, "product", "bf16", (e,))[0] for e in ENGINES]
        found |= {"fp8_efficiency": efficiency(chip, "fp8"), "fp8_layer_seconds": PRODUCTS * median(overhead)}
    return found


def rounded(value: Any) -> Any:
    """The same with three digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main() -> int:
    found = rounded({chip: constants(chip) for chip in CHIPS})
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for chip, of_chip in found.items():
        print(chip, {key: value for key, value in of_chip.items() if not isinstance(value, dict)}, of_chip["nccl"], of_chip["engines"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
