"""Measured constants of chips: what separates a roofline from a program that was timed.

Few constants per chip, in `calibration.toml` with the source of each. A chip without measurements borrows them and says so: its
figures carry a wider error. What the sources leave open is an interval, in addition to the value that is used. `ROOFLINE` takes the maker's
figures, and for every op the larger of its compute and memory time.
A chip that `partinf calibrate` measured brings rates of its own, and these alone make its prices.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput, nearest, raise_offences
from partinf.hardware.chips import Chip
from partinf.hardware.rates import Rates
from partinf.workload import DType


@dataclass(frozen=True)
class Calibration:
    """Constants of one chip.

    Attributes:
        matmul_efficiency: share of peak FLOP/s that large matmuls reach.
        hbm_share: share of the stated HBM bandwidth that the streams of a whole step reach, with what passes between one and the next. A
            single transfer is faster while it is under way: that is the proof's (`partinf.proof.pace`).
        streamed_share: the same for weights that a product reads itself, which are not read ahead; 0 for `hbm_share`.
        streamed_int8_share: the same for int8 weights; 0 for `streamed_share`.
        collective_factor: measured over modelled time of a collective's bytes.
        hop_seconds: time of one step of a ring, added to that of its bytes: at every hop a transfer is started, waited for and added
            up. 0 takes the chip's hop latency as a lower bound instead of adding it.
        collective_seconds: time of one collective in addition to its hops and bytes.
        switch_rings: collectives within a node go around its devices, so that each further one is a hop; else one hop reaches all.
        looped_hop_seconds: `hop_seconds` of a program that goes around its rings in loops of its own, where every hop is an operation that
            is issued and waited for; 0 for the same.
        least_rows: rows below which a product takes no less time on the core: its weights have to pass into the matrix unit anyway.
        extra_rows: rows that a product takes as long as in addition to its own, where weights pass into the matrix unit while it waits.
        kernel_seconds, row_seconds: what the kernel of decode takes on the core to begin, and for each row, whatever the context.
        score_seconds: what a score of a prompt takes on the core besides its products, where they are made tile by tile: mask, exponential,
            sums. tile_seconds: a pair of a tile of queries and one of keys, whether it is skipped or not. query_tile_seconds: a tile of
            queries.
        prompt_share: share of peak FLOP/s that the kernel for prompts reaches in the products that it makes, with all else that it does.
        layer_seconds: what the small operations of a layer take together, however little they pass over: norms, rotations, residuals.
        element_seconds: and for each element that they pass over: of a residual that devices split between sublayers, twice in a layer; of
            queries, keys and values, and once more of those that devices exchange. A residual that is whole on its device is passed over
            by its products.
        measured: whether these constants were fitted to measurements of this chip.
        error: relative error to expect of a predicted time.
        source: where the constants come from.
        rates: measured rates, which stand in place of the other constants.
        hides_memory: an op's memory traffic runs behind its compute, so that the longer of the two counts; else their sum does.
        intervals: constant → what the sources leave open of it, lowest and highest.
        left_out: median and worst relative error of measured times that were left out of the fit; None where there were none.
    """

    name: str
    matmul_efficiency: float
    hbm_share: float
    collective_factor: float
    hop_seconds: float
    measured: bool
    error: float
    source: str
    rates: Rates | None = None
    hides_memory: bool = True
    collective_seconds: float = 0.0
    switch_rings: bool = False
    looped_hop_seconds: float = 0.0
    least_rows: float = 0.0
    extra_rows: float = 0.0
    layer_seconds: float = 0.0
    kernel_seconds: float = 0.0
    row_seconds: float = 0.0
    streamed_share: float = 0.0
    streamed_int8_share: float = 0.0
    score_seconds: float = 0.0
    tile_seconds: float = 0.0
    query_tile_seconds: float = 0.0
    prompt_share: float = 1.0
    element_seconds: float = 0.0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    left_out: tuple[float, float] | None = None

    @property
    def evidence(self) -> str:
        """What the constants were held to, in a few words."""
        if not self.measured:
            return "not measured on this chip"
        if self.left_out is None:
            return "fitted to single operations; no step has been timed outside a serving engine"
        median, worst = self.left_out
        return f"steps left out of the fit are predicted within {median:.0%} in the median, {worst:.0%} at worst"

    def streamed(self, weights: DType) -> float:
        """The share of HBM at which a product reads weights of a type itself; 0 for `hbm_share`."""
        return self.streamed_int8_share or self.streamed_share if weights is DType.INT8 else self.streamed_share

    def slowed(self, rows: float) -> float:
        """How many times as long as its work at the rate of many rows a product of so many takes on the core: its weights have to pass into
        the matrix unit."""
        return max(1.0 + self.extra_rows / rows, self.least_rows / rows)

    def hop(self, looped: bool) -> float:
        """Time of a hop in a looped program or another."""
        return self.looped_hop_seconds if looped and self.looped_hop_seconds else self.hop_seconds


ROOFLINE = Calibration("none", 1.0, 1.0, 1.0, 0.0, False, 1.0, "pure roofline from the maker's figures")


@functools.cache
def _table() -> dict[str, Calibration]:
    data = tomllib.loads(resources.package_file("hardware/calibration.toml").read_text())
    known = {one.name for one in fields(Calibration)} - {"rates"}
    unknown = [(name, key) for name, row in data.items() for key in row if key not in known]
    raise_offences(f"calibration.toml [{name}]: unknown key '{key}'{nearest(key, known)}" for name, key in unknown)
    for row in data.values():
        row["intervals"] = {key: tuple(ends) for key, ends in row.get("intervals", {}).items()}
        row["left_out"] = tuple(row["left_out"]) if "left_out" in row else None
    return {name: Calibration(name=name, **row) for name, row in data.items()}


def calibration_for(chip: Chip, mode: str = "fitted") -> Calibration:
    """The constants for a chip.

    Args:
        mode: `fitted` for what was measured on the chip or its own constants, or those of its family where it has none; `none` for the
            pure roofline.

    Raises:
        InvalidInput: another mode.
    """
    if mode == "none":
        return ROOFLINE
    if mode != "fitted":
        raise InvalidInput(f"calibration '{mode}'; valid: fitted, none")
    rates = chip.rates
    if rates is not None:
        source = f"measured with partinf calibrate on {rates.date}: {rates.devices} × {rates.device_kind}, jax {rates.jax}"
        return Calibration(chip.name, 1.0, 1.0, 1.0, 0.0, True, rates.error, source, rates)
    table = _table()
    return table.get(chip.name) or table[chip.family]
