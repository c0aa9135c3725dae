"""Hardware files: a chip as `partinf calibrate` measured it, to be read in place of the shipped table's.

One file holds one chip: `[chip]` with the figures of the hardware table, `[measured]` with date and circumstances, and the measured rates
(`partinf.hardware.rates`), each named for what it is. Files of the devices of a machine lie in the user's configuration, one per kind of
device and number of devices, where a slice `local` finds them.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from partinf.errors import InvalidInput, nearest, raise_offences
from partinf.hardware.rates import CollectiveRate, Curve, Rates, TypeRates
from partinf.hardware.slices import Chip

_CIRCUMSTANCES = ("date", "device_kind", "devices", "jax", "error")
_SECTIONS = ("chip", "measured", "memory", "products", "types", "collectives", "spread")
_HEAD = """\
# A chip as `partinf calibrate` measured it. Seconds, bytes/s and FLOP/s, of one device while all of them work; see
# partinf/hardware/rates.py for what each rate is. Give it to a command as --hardware FILE.
"""


def default_path(device_kind: str, devices: int) -> Path:
    """Where the file of so many devices of this kind lies for the user."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    kind = re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")
    return config / "partinf" / "hardware" / f"{kind}-{devices}.toml"


def read_hardware(path: Path) -> Chip:
    """The chip of a hardware file, with its rates.

    Raises:
        InvalidInput: no such file, or everything that is wrong in it.
    """
    if not path.is_file():
        raise InvalidInput(f"--hardware {path}: no such file; partinf calibrate writes one")
    try:
        data = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: no TOML file: {error}") from None
    missing = [f"{path}: section [{name}] is missing" for name in _SECTIONS[:-1] if name not in data]
    raise_offences(missing + [f"{path}: unknown section [{name}]{nearest(name, _SECTIONS)}" for name in data if name not in _SECTIONS])
    offences: list[str] = []
    chip = _checked(Chip, data["chip"], f"{path} [chip]", offences, {"rates"})
    curves = {name: _checked(Curve, row, f"{path} [products.{name}]", offences) for name, row in data["products"].items()}
    types = {name: _checked(TypeRates, row, f"{path} [types.{name}]", offences) for name, row in data["types"].items()}
    rows = [{"op": op} | row for op, found in data["collectives"].items() for row in found]
    collectives = [_checked(CollectiveRate, row, f"{path} [collectives]", offences) for row in rows]
    found = {name: data["measured"].get(name) for name in _CIRCUMSTANCES}
    offences += [f"{path} [measured]: '{name}' is missing" for name, value in found.items() if value is None]
    offences += [f"{path} [measured]: unknown key '{name}'{nearest(name, found)}" for name in data["measured"] if name not in found]
    if "bytes_per_second" not in data["memory"]:
        offences.append(f"{path} [memory]: 'bytes_per_second' is missing")
    raise_offences(offences)
    rates = Rates(
        products=tuple((name, Curve(**_tuples(row))) for name, row in curves.items()),
        memory=data["memory"]["bytes_per_second"],
        types=tuple((name, TypeRates(**row)) for name, row in types.items()),
        collectives=tuple(CollectiveRate(**row) for row in collectives),
        spread=tuple(data.get("spread", {}).items()),
        **found,
    )
    return Chip(**_tuples(chip), rates=rates)


def write_hardware(chip: Chip) -> str:
    """The text of the hardware file of a chip that was measured."""
    rates = chip.rates
    assert rates is not None, "a hardware file describes what was measured"
    figures = {key: value for key, value in asdict(replace(chip, rates=None)).items() if key != "rates"}
    lines = [_HEAD, "[chip]", *_keys(figures), "", "[measured]", *_keys({name: getattr(rates, name) for name in _CIRCUMSTANCES})]
    lines += ["", "[memory]", f"bytes_per_second = {_value(rates.memory)}"]
    for name, curve in rates.products:
        lines += ["", f"[products.{name}]  # weights of this type, from memory: rows of the activations, FLOP/s"]
        lines += _keys({"sizes": curve.sizes, "rates": curve.rates})
    for name, of_type in rates.types:
        lines += ["", f"[types.{name}]  # activations of this type", *_keys(asdict(of_type))]
    lines += ["", "[collectives]  # by devices: seconds of one that moves nothing, and time of its bytes over that of the links"]
    for op in dict.fromkeys(rate.op for rate in rates.collectives):
        rows = [{"ways": r.ways, "seconds": r.seconds, "factor": r.factor} for r in rates.collectives if r.op == op]
        lines.append(f"{op} = [{', '.join('{ ' + ', '.join(_keys(row)) + ' }' for row in rows)}]")
    lines += ["", "[spread]  # half the distance of the quartiles of repeated measurements over their median"]
    lines += [f"{json.dumps(name)} = {_value(value)}" for name, value in rates.spread]
    return "\n".join(lines) + "\n"


def check_devices(chip: Chip, devices: int) -> None:
    """Raise `InvalidInput` where a slice of so many devices would be priced with rates that do not hold for it.

    Devices of a CPU share it: each is slower the more there are. Other devices are themselves.
    """
    rates = chip.rates
    if rates is None:
        return
    if chip.platform.virtual and rates.devices != devices:
        raise InvalidInput(
            f"the hardware file of {chip.name} was measured with {rates.devices} devices, which share one CPU; the slice has {devices}; "
            f"partinf calibrate --devices {devices} measures those"
        )
    if devices > 1 and not rates.collectives:
        raise InvalidInput(
            f"the hardware file of {chip.name} was measured on one device: no rates of collectives; the slice has {devices} devices"
        )


def _checked(kind: type, row: Any, where: str, offences: list[str], without: set[str] = frozenset()) -> Mapping[str, Any]:  # type: ignore[assignment]
    """The row, where it has the keys of a dataclass; what is missing or unknown joins `offences`."""
    known = {field.name: field for field in fields(kind) if field.name not in without}
    offences += [f"{where}: unknown key '{key}'{nearest(key, known)}" for key in row if key not in known]
    for name, field in known.items():
        if name not in row:
            if field.default is MISSING and field.default_factory is MISSING:
                offences.append(f"{where}: '{name}' is missing")
        elif field.type in ("float", "int") and not (isinstance(row[name], int | float) and row[name] >= 0):
            offences.append(f"{where}: {name} = {row[name]!r}; a number of at least 0 is expected")
    return dict(row)


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def _keys(row: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in row.items()]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return "inf" if math.isinf(value) else repr(float(f"{value:.4g}"))
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)
