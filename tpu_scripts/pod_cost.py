"""What a run may cost at most: chips × time to live × a dated price, from the hardware table or from a file of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pod_description import Description

from partinf.foundation import documents
from partinf.foundation.documents import finite, shown
from partinf.foundation.errors import InvalidInput, nearest, raise_offences
from partinf.hardware.chips import Price

_HEAD = {"currency": str, "date": str, "source": str, "checked": bool, "chip_hour": dict}


@dataclass(frozen=True)
class Estimate:
    """An upper bound and what it rests on.

    Attributes:
        total: for the whole time to live, all attempts together.
        basis: the sentence that says how it came about and what is uncertain.
    """

    total: float
    currency: str
    basis: str


def estimate(description: Description, prices: Path | None = None) -> Estimate:
    """The cost if the slice lives until its time is over.

    Args:
        prices: a price file; the list prices of the hardware table if not given.

    Raises:
        InvalidInput: the price file is malformed or has no price for the chip, or the table has none.
    """
    chip = description.tpu.slice.chip
    listed = chip.price if prices is None else _price(prices, chip.name)
    if listed is None:
        raise InvalidInput(f"there is no list price for '{chip.name}'; give one with --prices FILE")
    spot = description.spot and listed.spot is not None
    rate = listed.spot if spot else listed.on_demand
    chips, hours = description.tpu.num_chips, description.time_to_live / 3600
    doubt = [] if listed.checked else ["not checked against its source"]
    if description.spot and not spot:
        doubt.append("spot usually costs less, no spot price is in the list")
    price = f"{rate} per chip-hour ({'spot' if spot else 'on-demand'}, list of {listed.date}, {listed.source}"
    basis = f"{chips} {chip.name} chips x {hours:g} h x {price}"
    return Estimate(chips * hours * rate, listed.currency, basis + "".join(f"; {reason}" for reason in doubt) + ")")


def _price(path: Path, chip: str) -> Price:
    table = _read(path)
    rows = table.pop("chip_hour")
    if chip not in rows:
        raise InvalidInput(f"{path}: no price for '{chip}'{nearest(chip, rows)}")
    row = rows[chip]
    if not isinstance(row, dict):
        raise InvalidInput(f"{path}: chip_hour.{chip} = {shown(row)}; expected a table")
    wrong = [kind for kind in ("on_demand", "spot") if (finite(row.get(kind, 0)) or 0) < 0 or finite(row.get(kind, 0)) is None]
    wrong += [] if "on_demand" in row else ["on_demand"]
    raise_offences(f"{path}: chip_hour.{chip} needs a number for '{kind}'" for kind in wrong)
    return Price(on_demand=row["on_demand"], spot=row.get("spot"), **table)


def _read(path: Path) -> dict[str, Any]:
    table = documents.read_toml(path, f"--prices {path}")
    offences = [f"{path}: unknown key '{key}'{nearest(key, _HEAD)}" for key in table if key not in _HEAD]
    offences += [f"{path}: '{key}' must be {kind.__name__}" for key, kind in _HEAD.items() if not isinstance(table.get(key), kind)]
    raise_offences(offences)
    return table
