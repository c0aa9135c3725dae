"""Hardware files: a chip as `partinf calibrate` measured it, to be read in place of the shipped table's.

One file holds one chip: `[chip]` with the figures of the hardware table, `[measured]` with date and circumstances, and the measured rates
(`partinf.hardware.rates`), each named for what it is. Files of the devices of a machine lie in the user's configuration, one per kind of
device and number of devices, where a slice `local` finds them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from partinf.foundation import documents
from partinf.foundation.documents import Table, shown
from partinf.foundation.errors import InvalidInput, nearest, raise_offences
from partinf.foundation.limits import MAX_DEVICES
from partinf.hardware.chips import NOT_IN_FILES, Chip, chips
from partinf.hardware.platform import PLATFORMS
from partinf.hardware.rates import CollectiveRate, Curve, PaceRates, Rates, TypeRates
from partinf.hardware.slices import Slice, parse_slice

_CIRCUMSTANCES = ("date", "device_kind", "devices", "jax", "error")
_STATED = ("sides", "side_multiple", "core_links", "clock", "matrix_side", "host_shape", "compiler_config")
_NEEDED = ("chip", "measured", "memory", "products", "types", "collectives")
_SECTIONS = (*_NEEDED, "pace", "spread")
# Bytes/s, FLOP/s, rows: what no device is outside of, and neither times nor the products of a few of them leave the range of a float.
_LEAST, _MOST = 1e-3, 1e24
_MAY_BE_ZERO = ("factor", "error")
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
    where = f"hardware file {path}"
    if not documents.is_file(path):
        raise InvalidInput(f"{where}: no such file; partinf calibrate writes one")
    offences: list[str] = []
    file = Table(documents.read_toml(path, where), str(path), offences)
    offences += [f"{path}: section [{name}] is missing" for name in _NEEDED if name not in file]
    raise_offences(
        offences + [f"{path}: unknown section [{shown(n)[1:-1]}]{nearest(n, _SECTIONS)}" for n in file.data if n not in _SECTIONS]
    )
    chip = _chip(file.table("chip"))
    products, types, collectives = (file.table(name) for name in ("products", "types", "collectives"))
    curves = {name: _fields(Curve, products.table(name)) for name in products.data}
    activations = {name: _fields(TypeRates, types.table(name)) for name in types.data}
    rows = [(op, _fields(CollectiveRate, row, without=("op",))) for op in collectives.data for row in collectives.tables(op)]
    measured = _fields(Rates, file.table("measured"), without=[f.name for f in fields(Rates) if f.name not in _CIRCUMSTANCES])
    memory = file.table("memory")
    bandwidth = memory.number("bytes_per_second", low=_LEAST, high=_MOST)
    memory.refuse_unknown()
    pace = file.table("pace", default=None)
    paces = None if pace is None else PaceRates(**_fields(PaceRates, pace))
    spread = file.table("spread", default=None)
    spreads = [] if spread is None else [(name, spread.number(name)) for name in spread.data]
    offences += _inconsistent(str(path), chip, curves, rows)
    raise_offences(offences)
    rates = Rates(
        products=tuple((name, Curve(**row)) for name, row in curves.items()),
        memory=bandwidth,
        types=tuple((name, TypeRates(**row)) for name, row in activations.items()),
        collectives=tuple(CollectiveRate(op=op, **row) for op, row in rows),
        spread=tuple(spreads),
        pace=paces,
        **measured,
    )
    return Chip(**chip, rates=rates)


def write_hardware(chip: Chip) -> str:
    """The text of the hardware file of a chip that was measured."""
    rates = chip.rates
    assert rates is not None, "a hardware file describes what was measured"
    figures = {key: value for key, value in asdict(replace(chip, rates=None)).items() if key not in NOT_IN_FILES}
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
    if rates.pace is not None:
        lines += [
            "",
            "[pace]  # shares of the times that the compiler states, and its least one; 0 where it states none",
            *_keys(asdict(rates.pace)),
        ]
    lines += ["", "[spread]  # half the distance of the quartiles of repeated measurements over their median"]
    lines += [f"{json.dumps(name)} = {_value(value)}" for name, value in rates.spread]
    return "\n".join(lines) + "\n"


def slice_of(text: str, mesh: str | None = None, hardware: str | Path | None = None) -> Slice:
    """A slice by name, of the chip of a hardware file where one is named.

    Raises:
        InvalidInput: as `parse_slice` and `read_hardware`, or a file of another chip or number of devices.
    """
    chip = None if hardware is None else read_hardware(Path(hardware))
    found = parse_slice(text, mesh, chip)
    if chip is not None and found.chip is not chip:
        raise InvalidInput(f"hardware file {hardware} is of {chip.name}, slice {text} of {found.chip.name}")
    check_devices(found.chip, found.num_devices)
    return found


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


def _chip(table: Table) -> dict[str, Any]:
    """The fields of a chip. What no measurement finds and the file leaves out is as the hardware table has it for the chip of that name."""
    shipped = chips().get(str(table.data.get("name")))
    stated = {} if shipped is None else {name: getattr(shipped, name) for name in _STATED}
    named = {} if shipped is None else {"cloud": shipped.cloud, "price": shipped.price, "machines": shipped.machines}
    return _fields(Chip, table, NOT_IN_FILES, stated) | named


def _fields(kind: type, table: Table, without: Iterable[str] = (), defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The fields of a dataclass that a table gives, each of its type and in the range in which prices are made of it.

    Args:
        defaults: values of fields that the table leaves out, in place of the dataclass's own.
    """
    found: dict[str, Any] = {}
    for field in fields(kind):
        if field.name in without:
            continue
        default = {} if field.default is MISSING else {"default": defaults.get(field.name, field.default)}
        if field.type == "float":
            positive = not field.name.endswith("seconds") and field.name not in _MAY_BE_ZERO and field.default is MISSING
            low, high = (_LEAST, _MOST) if positive else (0.0, _MOST)
            found[field.name] = table.number(field.name, low=low, high=high, infinite=kind is TypeRates, **default)
        elif field.type == "int":
            found[field.name] = table.whole(field.name, low=0 if default else 1, high=1 << 60, **default)
        elif field.type == "bool":
            found[field.name] = table.flag(field.name, **default)
        elif field.type == "tuple[float, ...]":
            found[field.name] = table.numbers(field.name, low=_LEAST, high=_MOST)
        elif field.type == "tuple[int, ...]":
            found[field.name] = table.wholes(field.name, low=1, high=MAX_DEVICES, **default)
        elif field.type == "tuple[str, ...]":
            found[field.name] = table.texts(field.name, **default)
        else:
            found[field.name] = table.text(field.name, **default)
    table.refuse_unknown()
    return found


def _inconsistent(
    path: str, chip: Mapping[str, Any], curves: Mapping[str, Mapping[str, Any]], rows: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[str]:
    """What is wrong between figures that are right alone."""
    offences = []
    if chip["family"] not in PLATFORMS:
        offences.append(f"{path} [chip]: family = {shown(chip['family'])}; expected one of {', '.join(PLATFORMS)}")
    if chip["torus_dims"] not in (0, 2, 3):
        offences.append(f"{path} [chip]: torus_dims = {chip['torus_dims']}; expected 2 or 3, or 0 where a switch joins the chips")
    links = ("link_bandwidth", "wrap_multiple", "core_links") if chip["torus_dims"] else ("switch_bandwidth", "node_size")
    offences += [
        f"{path} [chip]: {key} = {chip[key]}; expected a positive number, by which its links are priced" for key in links if not chip[key]
    ]
    if not 1 <= chip["devices_per_chip"] <= 64 or not 1 <= chip["max_axis"] <= MAX_DEVICES:
        offences.append(f"{path} [chip]: devices_per_chip from 1 to 64 and max_axis from 1 to {MAX_DEVICES:,} are expected")
    for name, curve in curves.items():
        sizes, rates = curve["sizes"], curve["rates"]
        if not sizes or len(sizes) != len(rates) or any(low >= high for low, high in itertools.pairwise(sizes)):
            offences.append(f"{path} [products.{name}]: sizes that rise, and as many rates, are expected")
    for op, among in itertools.groupby(rows, key=lambda row: row[0]):
        ways = [row["ways"] for _, row in among]
        if len(set(ways)) < len(ways) or not all(2 <= way <= MAX_DEVICES for way in ways):
            offences.append(f"{path} [collectives]: {op}: ways from 2 to {MAX_DEVICES:,} are expected, each once")
    return offences


def _keys(row: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in row.items()]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return "inf" if math.isinf(value) else repr(float(f"{value:.4g}"))
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)
