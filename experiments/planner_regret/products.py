"""How fast the TPU compiler takes products, by what limits them, out of the programs that `compiled` compiled.

    python -m experiments.planner_regret.products TEXTS     # reads, compiles nothing; prints, writes products.json

Constants of the cost model that have no other source come from here (`partinf/hardware/calibration.toml`): `least_rows` from products of
few rows whose weights lie on the chip already, `streamed_share` and `streamed_int8_share` from those that read theirs from HBM, and what
heads that are narrower than the matrix unit cost products of many rows (`matrix_side` in hardware.toml).
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.planner_regret.compiled import Texts, programs
from experiments.results import write
from partinf.cost.calibration import calibration_for
from partinf.hardware.slices import Slice
from partinf.proof.hlo import Module
from partinf.proof.pace import pace_of, stated_byte_rate
from partinf.proof.traffic import hbm_bytes, product_of

LEAST_BYTES, STREAMED_BYTES = 1e7, 2.5e7  # of a matrix that is counted, and of one whose reading is
FEW, SOME, MANY = (
    64,
    200,
    512,
)  # rows of a product that the passing of weights limits at most, where it still shows, and where work limits it


class Product(NamedTuple):
    """One product of a compiled program: its rows, its greatest operand and whether that lies in HBM, bytes read, seconds, and the width of
    a head that it makes, if any."""

    chip: str
    dtype: str
    rows: float
    elements: int
    in_hbm: bool
    read: int
    seconds: float
    head: int


def products(module: Module, slice_: Slice) -> Iterator[Product]:
    """All products with a matrix of some size, equal ones once."""
    pace, seen = pace_of(slice_), set()
    for block in module.computations.values():
        for one in block.instructions:
            found = product_of(module, block, one) if one.cycles else None
            shapes = [block.by_name[name].shapes[0] for name in one.operands if name in block.by_name and block.by_name[name].shapes]
            matrix = max((shape for shape in shapes if shape.dtype in ("bf16", "s8")), key=lambda shape: shape.num_bytes, default=None)
            if found is None or matrix is None or matrix.num_bytes < LEAST_BYTES or len(matrix.dims) < 2:
                continue
            elements = matrix.num_bytes // (1 if matrix.dtype == "s8" else 2)
            both = sum(shape.num_bytes >= LEAST_BYTES for shape in shapes) > 1 and found[0] / 2 / elements < MANY
            key = (matrix.dtype, matrix.dims, one.shapes[0].dims, one.cycles)
            if both or key in seen or block.name != module.entry:
                continue  # two matrices in one operation, stacked layers
            seen.add(key)
            dims = one.shapes[0].dims
            head = dims[-1] if len(dims) >= 3 and dims[-1] <= 256 else 0
            yield Product(
                slice_.chip.name, matrix.dtype, found[0] / 2 / elements, elements, matrix.hbm_bytes > 0, hbm_bytes(module, block, one),
                pace.product(one.cycles, *found), head,
            )  # fmt: skip


def figures(slice_: Slice, found: list[Product]) -> dict[str, Any]:
    """Of one chip and one type of weights: medians, each with how many products there were."""
    chip = slice_.chip
    peak, efficiency = chip.peak_bf16 / chip.devices_per_chip, calibration_for(chip).matmul_efficiency
    reached = lambda ones: [2 * one.rows * one.elements / one.seconds / peak for one in ones]  # noqa: E731
    few = [peak * efficiency * one.seconds / (2 * one.elements) for one in found if one.rows <= FEW and not one.in_hbm]
    read = [one for one in found if one.rows <= FEW and one.in_hbm and one.read >= STREAMED_BYTES]
    share = [sum(one.read for one in read) / sum(one.seconds for one in read) / stated_byte_rate(chip)] if read else []
    some = [one for one in found if one.rows >= SOME and not 0 < one.head < chip.matrix_side]
    extra = [efficiency / share * one.rows - one.rows for one, share in zip(some, reached(some), strict=True)]
    many = [one for one in found if one.rows >= MANY]
    heads, others = reached([one for one in many if one.head]), reached([one for one in many if not one.head])
    narrow = reached([one for one in many if 0 < one.head < chip.matrix_side])
    parts = {
        "least_rows": few,
        "extra_rows": extra,
        "streamed_share": share,
        "peak": others,
        "peak_into_heads": heads,
        "peak_into_narrow_heads": narrow,
    }
    return {name: {"value": statistics.median(of), "of": len(read) if of is share else len(of)} for name, of in parts.items() if of}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    kept: dict[tuple[str, str], list[Product]] = defaultdict(list)
    slices: dict[str, Slice] = {}
    for plan, program in programs(Texts(parser.parse_args().texts, compiling=False)):
        slices[plan.slice.chip.name] = plan.slice
        for one in products(Module(program), plan.slice):
            kept[one.chip, one.dtype].append(one)
    rows = [{"chip": chip, "weights": dtype} | figures(slices[chip], list(set(found))) for (chip, dtype), found in sorted(kept.items())]
    for row in rows:
        print(row)
    write(__file__, rows, "products.json")


if __name__ == "__main__":
    main()
