"""What a run may cost at most: chips × time to live × a price from a dated file that the user can replace."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pod_checkout import HERE
from pod_description import Description

from partinf.errors import InvalidInput, nearest, raise_offences

PRICES = HERE / "prices.toml"
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


def estimate(description: Description, prices: Path = PRICES) -> Estimate:
    """The cost if the slice lives until its time is over.

    Raises:
        InvalidInput: the price file is malformed or has no price for the chip.
    """
    table = _read(prices)
    chip = description.tpu.generation.chip
    row = table["chip_hour"].get(chip)
    if row is None:
        raise InvalidInput(f"{prices}: no price for '{chip}'{nearest(chip, table['chip_hour'])}")
    kind = "spot" if description.spot and "spot" in row else "on_demand"
    if not isinstance(row.get(kind), int | float):
        raise InvalidInput(f"{prices}: chip_hour.{chip} needs a number for '{kind}'")
    chips, hours = description.tpu.num_chips, description.time_to_live / 3600
    total = chips * hours * row[kind]
    doubt = [] if table["checked"] else ["not checked against its source"]
    if description.spot and kind == "on_demand":
        doubt.append("spot usually costs less, no spot price is in the file")
    price = f"{row[kind]} per chip-hour ({kind.replace('_', '-')}, list of {table['date']}, {table['source']}"
    basis = f"{chips} {chip} chips x {hours:g} h x {price}"
    return Estimate(total, table["currency"], basis + "".join(f"; {reason}" for reason in doubt) + ")")


def _read(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f"--prices {path}: {error}") from None
    offences = [f"{path}: unknown key '{key}'{nearest(key, _HEAD)}" for key in table if key not in _HEAD]
    offences += [f"{path}: '{key}' must be {kind.__name__}" for key, kind in _HEAD.items() if not isinstance(table.get(key), kind)]
    raise_offences(offences)
    return table
