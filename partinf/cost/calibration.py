"""Measured constants of chips: what separates a roofline from a program that somebody timed.

Four constants per chip, in `calibration.toml` with the source of each. A chip without measurements borrows them and says so: its
figures carry a wider error. `ROOFLINE` takes the maker's figures, and for every op the larger of its compute and memory time.
A chip that `partinf calibrate` measured brings rates of its own, and these alone make its prices.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, fields

from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput, nearest, raise_offences
from partinf.hardware.chips import Chip
from partinf.hardware.rates import Rates


@dataclass(frozen=True)
class Calibration:
    """Constants of one chip.

    Attributes:
        matmul_efficiency: share of peak FLOP/s that large matmuls reach.
        hbm_share: share of the stated HBM bandwidth that streams reach.
        collective_factor: measured over modelled time of a collective's bytes.
        hop_seconds: time of one step of a ring, added to that of its bytes: at every hop a transfer is started, waited for and added
            up. 0 takes the chip's hop latency as a lower bound instead of adding it.
        measured: whether these constants were fitted to measurements of this chip.
        error: relative error to expect of a predicted time.
        source: where the constants come from.
        rates: measured rates, which stand in place of the other constants.
        hides_memory: an op's memory traffic runs behind its compute, so that the longer of the two counts; else their sum does.
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


ROOFLINE = Calibration("none", 1.0, 1.0, 1.0, 0.0, False, 1.0, "pure roofline from the maker's figures")


@functools.cache
def _table() -> dict[str, Calibration]:
    data = tomllib.loads(resources.package_file("hardware/calibration.toml").read_text())
    known = {field.name for field in fields(Calibration)} - {"rates"}
    unknown = [(name, key) for name, row in data.items() for key in row if key not in known]
    raise_offences(f"calibration.toml [{name}]: unknown key '{key}'{nearest(key, known)}" for name, key in unknown)
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
