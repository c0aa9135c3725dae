"""Published measurements (published.toml), and what the cost model says of each under the description of the program that was timed.

Held against the model are whole steps and single operations. A row of a serving engine holds the engine's own time besides; `Engine` is
what was fitted of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from experiments.published.sets import sets
from partinf.cost.calibration import Calibration, calibration_for
from partinf.cost.collectives import Network
from partinf.cost.ledger import Ledger, Op
from partinf.cost.pricing import Pricing
from partinf.cost.program import PROGRAMS
from partinf.cost.split import Shares, StepShape, StepSplit
from partinf.cost.step import step_ledger
from partinf.hardware.chips import Chip, chips
from partinf.hardware.slices import Slice, parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.workload import DType


@dataclass(frozen=True)
class Engine:
    """What a serving engine takes besides its program. A time per step has no place among these: fitted with them it is nothing for one
    engine and improves no row of the other, and rows of one model cannot tell it from a time per layer.

    Attributes:
        layer_seconds: of every layer of a step. row_seconds: of every row in every layer.
    """

    layer_seconds: float = 0.0
    row_seconds: float = 0.0

    def seconds(self, layers: int, rows: int) -> float:
        return layers * (self.layer_seconds + rows * self.row_seconds)


@dataclass(frozen=True)
class Row:
    """One published time with all that the model needs to say its own.

    Attributes:
        set: name of its set. chip: of the machine. what: `decode`, `prefill`, or a kind of operation. label: the row in a few words.
        fields: of its set and of itself, the latter first. seconds: measured.
    """

    set: str
    chip: str
    what: str
    label: str
    fields: dict[str, Any]
    seconds: float

    @property
    def engine(self) -> str:
        """The serving engine that was timed, if one was."""
        return str(self.fields.get("engine", ""))


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows that the cost model has words for."""
    return tuple(row for one in sets() if one.get("priced", True) for row in _KINDS[one["kind"]](one))


def unpriced() -> tuple[dict[str, Any], ...]:
    """The sets that it has no words for."""
    return tuple(one for one in sets() if not one.get("priced", True))


def _steps(one: dict[str, Any]) -> Iterator[Row]:
    chip = one["machine"].split(":")[0]
    for row in one["rows"]:
        fields = one | row
        if not row.get("step_ms", 1):
            continue  # the source timed its first token alone
        allocated = f", {row['allocated']} positions" if "allocated" in row else f", {row['input']} in"
        label = f"batch {row['batch']}{allocated}"
        seconds = row["step_ms"] / 1e3 if "step_ms" in row else 1 / row["tokens_per_second"]
        yield Row(one["name"], chip, "decode", label, fields, seconds)
        if "prefill_seconds" in row:
            yield Row(one["name"], chip, "prefill", label, fields, row["prefill_seconds"])


def _paper(one: dict[str, Any]) -> Iterator[Row]:
    for row in one["rows"]:
        yield Row(one["name"], one["machine"], row["phase"], row["column"], one | row, row["seconds"])


def _collectives(one: dict[str, Any]) -> Iterator[Row]:
    for row in one["rows"]:
        label = f"{row['op']}({row['axes']}) of {row['bytes']:,} bytes on {row['slice']}"
        yield Row(one["name"], one["machine"], "collective", label, one | row, row["microseconds"] / 1e6)


def _permutes(one: dict[str, Any]) -> Iterator[Row]:
    for row in one["rows"]:
        for num_bytes in (0, 1 << 20):
            seconds = row["microseconds"] / 1e6 + num_bytes / row["gigabytes_per_second"] / 1e9
            fields = one | row | {"op": "collective-permute", "axes": "x", "bytes": num_bytes}
            yield Row(one["name"], row["slice"].split(":")[0], "collective", f"{num_bytes:,} bytes on {row['slice']}", fields, seconds)


def _moved(one: dict[str, Any]) -> Iterator[Row]:
    """The fixed time alone: that of the smallest, less its bytes at the rate of the largest."""
    smallest, largest = one["rows"][0], one["rows"][-1]
    seconds = smallest["bytes"] / 1e9 * (1 / smallest["gigabytes_per_second"] - 1 / largest["gigabytes_per_second"])
    fields = one | {"op": "all-gather", "axes": "x", "bytes": 0, "slice": "tpu7x:4x4x4"}
    yield Row(one["name"], one["machine"], "collective", "an empty one", fields, seconds)


def _copies(one: dict[str, Any]) -> Iterator[Row]:
    for row in one["rows"]:
        num_bytes = row["mebibytes"] * 2**20
        yield Row(one["name"], row["chip"], "copy", f"{row['mebibytes']} MiB", one | row, num_bytes / row["terabytes_per_second"] / 1e12)


def _products(one: dict[str, Any]) -> Iterator[Row]:
    for row in one["rows"]:
        seconds = 2 * row["size"] ** 3 / row["teraflops_per_second"] / 1e12
        yield Row(one["name"], row["chip"], "product", f"{row['size']} cubed", one | row, seconds)


_KINDS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "steps": _steps,
    "paper": _paper,
    "collectives": _collectives,
    "permutes": _permutes,
    "moved": _moved,
    "copies": _copies,
    "products": _products,
}


def predicted(row: Row, constants: Calibration | None = None, engines: dict[str, Engine] | None = None) -> float:
    """Seconds that the cost model says, with what the row's engine takes besides.

    Args:
        constants: in place of those of the row's chip. engines: constants of engines; without, an engine takes nothing.
    """
    chip = chips()[row.chip]
    used = constants or calibration_for(chip)
    if row.what == "collective":
        return _collective_seconds(row, used)
    if row.what in ("copy", "product"):
        return _operation_seconds(row, used, chip)
    seconds = step(row, used).seconds
    engine = (engines or {}).get(row.engine)
    return seconds + engine.seconds(_placed(row.set)[0].num_layers, row.fields["batch"]) if engine else seconds


def step(row: Row, constants: Calibration) -> Ledger:
    """The ledger of a step."""
    if "column" in row.fields:
        from experiments.calibrate_v4.measured import COLUMNS, predict

        return predict(next(column for column in COLUMNS if column.name == row.fields["column"]), constants)
    fields = row.fields
    model, slice_, layout = _placed(row.set)
    if row.what == "prefill":
        shape = StepShape(prefill_tokens=fields["batch"] * fields["prompt"], prefill_slots=fields["batch"])
    else:
        context = fields["context"] if "context" in fields else fields["input"] + fields["output"] // 2
        shape = StepShape(decode_rows=fields["batch"], decode_context=context, allocated=fields.get("allocated"))
    pricing = Pricing(slice_, constants, program=PROGRAMS[fields["program"]])
    weights, kv = DType(fields["weights"]), DType(fields["kv"])
    return step_ledger(StepSplit(model, layout, layout.phase(row.what), shape, pricing, weights, kv, Shares()))


@functools.cache
def _placed(name: str) -> tuple[ModelConfig, Slice, Layout]:
    """Model, slice and layout of a set of steps."""
    one = next(one for one in sets() if one["name"] == name)
    layout = make_layout(one["storage"], one["attention"], one["attention"], experts=one.get("experts"))
    return load_model_config(one["model"]), parse_slice(one["machine"], one.get("mesh")), layout


def least(row: Row) -> float:
    """Seconds that the weights and the cache of a step take at the stated rate of HBM: no prediction may be below."""
    slice_ = parse_slice(row.fields.get("slice", row.fields["machine"]), row.fields.get("mesh"))
    ledger = step(row, calibration_for(slice_.chip))
    return (ledger.weight_bytes + ledger.kv_bytes) * slice_.chip.devices_per_chip / slice_.chip.hbm_bandwidth


def _collective_seconds(row: Row, constants: Calibration) -> float:
    fields = row.fields
    network = Network(
        parse_slice(fields["slice"]),
        factor=constants.collective_factor,
        hop_seconds=constants.hop_seconds,
        fixed_seconds=constants.collective_seconds,
    )
    return network.seconds(Op(fields["op"]), tuple(fields["axes"]), fields["bytes"])


def _operation_seconds(row: Row, constants: Calibration, chip: Chip) -> float:
    if row.what == "copy":
        return float(row.fields["mebibytes"]) * 2**20 / (chip.hbm_bandwidth * constants.hbm_share)
    size, rate = float(row.fields["size"]), chip.peak_bf16 / chip.devices_per_chip * constants.matmul_efficiency
    return 2 * size**3 / rate * constants.slowed(size)
