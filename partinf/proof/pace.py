"""Constants of a chip that correct the TPU compiler's own account of a program: how its cycles differ from what traces show.

The compiler expects too much of small operations, and of products whose weights lie on the chip already; how much was read from profiler
traces where there are any (`hardware/pace.toml`, with the evidence of each row). A chip without a row takes that of its family; what
`partinf calibrate` measured on a chip stands in place of both.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from partinf.foundation import resources
from partinf.foundation.errors import raise_offences
from partinf.hardware.chips import Chip
from partinf.hardware.slices import Slice

_TABLE = "hardware/pace.toml"
_KEYS = {"transfer_share", "product_share", "reading_share", "moving_share", "peak_share", "least_seconds", "small_seconds", "evidence"}
_READS = 0.5  # of the time of a product that reads its matrix itself, what its bytes take at least


@dataclass(frozen=True)
class Pace:
    """Rates of one device.

    Attributes:
        clock: of the compiler's cycles; 0 where it is not known, and cycles take no time then.
        byte_rate: bytes/s between HBM and the device while a transfer is under way. A whole step reaches less (`Calibration.hbm_share`),
            since HBM waits for the core now and then, which the walk sees.
        product_share: share of the compiler's cycles that a product takes whose matrix lies on the chip.
        reading_share: the same where it reads the matrix from HBM itself, apart from the time of these bytes.
        moving_share: the same for an operation that only moves or converts what it is given.
        flops, int8_flops: FLOP/s that a product reaches at most.
        least_seconds: the least that the compiler says of an operation that passes over arrays. small_seconds: what the least takes.
        evidence: where these come from.
    """

    clock: float
    byte_rate: float
    product_share: float
    reading_share: float
    moving_share: float
    flops: float
    int8_flops: float
    least_seconds: float
    small_seconds: float
    evidence: str

    def product(self, cycles: int, operations: float, integers: bool, reading: float = 0.0) -> float:
        """Seconds of a product, from the compiler's cycles and its multiplications and additions.

        Args:
            reading: seconds of the bytes of HBM that it reads itself. Where these are most of its time, the cycles are the compiler's guess
                at the rate of HBM.
        """
        nominal = self._nominal(cycles)
        share = self.reading_share if reading > _READS * self.product_share * nominal else self.product_share
        return min(nominal, max(share * nominal, operations / (self.int8_flops if integers else self.flops)))

    def moving(self, cycles: int) -> float:
        """Seconds of an operation that only moves or converts; its bytes may take longer."""
        nominal = self._nominal(cycles)
        return min(nominal, max(self.small_seconds, self.moving_share * nominal))

    def other(self, cycles: int) -> float:
        """Seconds of any other operation: the compiler's, less what it says too much of the least one."""
        nominal = self._nominal(cycles)
        return min(nominal, max(self.small_seconds, nominal - (self.least_seconds - self.small_seconds)))

    def _nominal(self, cycles: int) -> float:
        return cycles / self.clock if self.clock else 0.0


@functools.cache
def _rows() -> Mapping[str, Mapping[str, float | str]]:
    rows = tomllib.loads(resources.package_file(_TABLE).read_text())
    offences = [f"{_TABLE} [{name}]: {key}: missing" for name, row in rows.items() for key in sorted(_KEYS - set(row))]
    offences += [f"{_TABLE} [{name}]: unknown key '{key}'" for name, row in rows.items() for key in row if key not in _KEYS]
    raise_offences(offences)
    return rows


def pace_of(slice_: Slice) -> Pace:
    """The constants of one device of a slice."""
    chip, rows = slice_.chip, _rows()
    row = rows.get(chip.name) or rows[chip.family]
    share, rates = chip.devices_per_chip, chip.rates
    byte_rate, evidence = stated_byte_rate(chip) * float(row["transfer_share"]), str(row["evidence"])
    if rates is not None:
        byte_rate = rates.memory
        if rates.pace is not None:
            row = dict(row) | {key: value for key, value in asdict(rates.pace).items() if value}
            evidence = f"measured with partinf calibrate on {rates.date}"
    return Pace(
        clock=chip.clock,
        byte_rate=byte_rate,
        product_share=float(row["product_share"]),
        reading_share=float(row["reading_share"]),
        moving_share=float(row["moving_share"]),
        flops=chip.peak_bf16 / share * float(row["peak_share"]),
        int8_flops=chip.peak_int8 / share * float(row["peak_share"]),
        least_seconds=float(row["least_seconds"]),
        small_seconds=float(row["small_seconds"]),
        evidence=evidence,
    )


def stated_byte_rate(chip: Chip) -> float:
    """Bytes per second of HBM of one device, as the maker states it."""
    return chip.hbm_bandwidth / chip.devices_per_chip
