"""Measured constants of chips: what separates a roofline from a program that somebody timed.

Four constants per chip, in `calibration.toml` with the source of each. A chip without measurements borrows them and says so: its
figures carry a wider error. Every op takes the larger of its compute and memory time; `ROOFLINE` takes both from the maker's figures.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, fields

from partinf import resources
from partinf.errors import InvalidInput, nearest, raise_offences
from partinf.hardware import Chip


@dataclass(frozen=True)
class Calibration:
    """Constants of one chip.

    Attributes:
        matmul_efficiency: share of peak FLOP/s that large matmuls reach.
        hbm_share: share of the stated HBM bandwidth that streams reach.
        collective_factor: measured over modelled time of a collective's bytes.
        hop_seconds: time of one hop of a collective, added to that of its bytes: a looped collective starts a transfer and a partial
            matmul at every hop. 0 takes the chip's hop latency as a lower bound instead of adding it.
        measured: whether these constants were fitted to measurements of this chip.
        error: relative error to expect of a predicted time.
        source: where the constants come from.
    """

    name: str
    matmul_efficiency: float
    hbm_share: float
    collective_factor: float
    hop_seconds: float
    measured: bool
    error: float
    source: str


ROOFLINE = Calibration("none", 1.0, 1.0, 1.0, 0.0, False, 1.0, "pure roofline from the maker's figures")


@functools.cache
def _table() -> dict[str, Calibration]:
    data = tomllib.loads(resources.package_file("calibration.toml").read_text())
    known = {field.name for field in fields(Calibration)}
    unknown = [(name, key) for name, row in data.items() for key in row if key not in known]
    raise_offences(f"calibration.toml [{name}]: unknown key '{key}'{nearest(key, known)}" for name, key in unknown)
    return {name: Calibration(name=name, **row) for name, row in data.items()}


def calibration_for(chip: Chip, mode: str = "fitted") -> Calibration:
    """The constants for a chip.

    Args:
        mode: `fitted` for the chip's own constants, or those of its family where it has none; `none` for the pure roofline.

    Raises:
        InvalidInput: another mode.
    """
    if mode == "none":
        return ROOFLINE
    if mode != "fitted":
        raise InvalidInput(f"calibration '{mode}'; valid: fitted, none")
    table = _table()
    return table.get(chip.name) or table[chip.family]
