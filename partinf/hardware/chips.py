"""Chips: all that the project knows of each, read from `hardware.toml`, the one file that a new chip changes.

What a maker states (memory, rates, links, the shapes in which slices are offered), what the TPU compiler calls it, what Google Cloud calls
it and what it costs there. A key that a chip does not have, or that is unpublished, is `false` in the table.
"""

from __future__ import annotations

import functools
import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput, nearest, raise_offences
from partinf.foundation.limits import MAX_DEVICES
from partinf.hardware.platform import Platform, platform_named
from partinf.hardware.rates import Rates


@dataclass(frozen=True)
class CloudType:
    """How Google Cloud names slices of a TPU chip.

    Attributes:
        prefix: of the accelerator type; `v5litepod` in `v5litepod-16`.
        cores_per_number: what the number of a type counts per chip: TensorCores for v4, v5p and TPU7x (two), chips for v5e and v6e (one).
        chips_per_host: chips of one virtual machine of a slice that has several.
        whole_host: up to so many chips share one virtual machine.
        free_shape: any other shape of whole cubes, every side a multiple of the chip's `wrap_multiple`, may be requested by its topology.
        runtime: software version of the TPU VM.
        gke_accelerator: the label of its nodes in Kubernetes.
        topologies: numbers of types, each with its chips along each torus axis.
        source: where these names come from.
    """

    prefix: str
    cores_per_number: int
    chips_per_host: int
    whole_host: int
    free_shape: bool
    runtime: str
    gke_accelerator: str
    topologies: tuple[tuple[str, str], ...]
    source: str

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Number of a type → chips along each torus axis, as the cloud writes them."""
        return {number: tuple(map(int, topology.split("x"))) for number, topology in self.topologies}

    def number_of(self, shape: tuple[int, ...]) -> str | None:
        """The number of the type with this shape, whichever way round; None where no type has it."""
        return next((number for number, sides in self.shapes.items() if sorted(sides) == sorted(shape)), None)

    @property
    def most_chips(self) -> int:
        """Chips of the largest slice."""
        return max(map(math.prod, self.shapes.values()))

    def num_hosts(self, num_chips: int) -> int:
        """Virtual machines of a slice of so many chips, each running one process."""
        return 1 if num_chips <= self.whole_host else num_chips // self.chips_per_host


@dataclass(frozen=True)
class Price:
    """A list price per chip and hour.

    Attributes:
        on_demand: without a contract. spot: of capacity that may be taken away; None where the list has no such price.
        date: what the figures are of. source: where to check them. checked: whether they were compared with the source.
    """

    on_demand: float
    currency: str
    date: str
    source: str
    checked: bool
    spot: float | None = None


@dataclass(frozen=True)
class Chip:
    """One accelerator chip as its maker states it. Bytes, bytes/s, FLOP/s, Hz and seconds, all per chip.

    Attributes:
        family: its platform (`partinf.hardware.platform`).
        usable_hbm: bytes that a compiled program may use.
        torus_dims: dimensions of the inter-chip torus, 0 where a switch joins the chips.
        wrap_multiple: a torus axis wraps around when its size is a multiple of this; in a 3D torus, when all of them are.
        sides, side_multiple: lengths of a torus axis in which the chip is offered: these, and multiples of that up to `max_axis`; without
            both, all up to `max_axis`.
        link_bandwidth: one torus link, one way.
        core_links: the link between the devices of one chip, in torus links.
        switch_bandwidth: one chip into its node's switch, one way; `node_size` chips share a switch.
        devices_per_chip: JAX devices per chip, each owning an equal part of memory and compute.
        hop_seconds: latency of one hop of a collective.
        clock: of the cycles that the TPU compiler counts; 0 where it is not known.
        matrix_side: rows and columns of a matrix unit; 0 where it is not known.
        host_shape: chips of one host along each axis, as the TPU compiler takes it.
        compiler_config: name of the configuration that the TPU compiler wants for it in addition to its own name, if any.
        device_kinds: how JAX names the chip's devices, in lower case; a part of the name for GPUs.
        provisional: the figures are orders of magnitude, neither published nor measured.
        source: where the figures come from.
        cloud: how Google Cloud names its slices. price: what one costs. machines: names of virtual machines with switched chips, each with
            how many it has. None of these stands in hardware files.
        rates: what was measured on such devices (`partinf.hardware.hardware_file`); None for the shipped table.
    """

    name: str
    family: str
    hbm: int
    usable_hbm: int
    hbm_bandwidth: float
    peak_bf16: float
    peak_int8: float
    host_bandwidth: float
    dcn_bandwidth: float
    source: str
    device_kinds: tuple[str, ...] = ()
    torus_dims: int = 0
    wrap_multiple: int = 0
    sides: tuple[int, ...] = ()
    side_multiple: int = 0
    max_axis: int = MAX_DEVICES
    link_bandwidth: float = 0.0
    core_links: float = 6.0
    node_size: int = 0
    switch_bandwidth: float = 0.0
    devices_per_chip: int = 1
    hop_seconds: float = 1e-6
    clock: float = 0.0
    matrix_side: int = 0
    host_shape: tuple[int, ...] = ()
    compiler_config: str = ""
    provisional: bool = False
    cloud: CloudType | None = field(default=None, repr=False)
    price: Price | None = field(default=None, repr=False)
    machines: tuple[tuple[str, int], ...] = ()
    rates: Rates | None = None

    @property
    def platform(self) -> Platform:
        """What such devices want.

        Raises:
            InvalidInput: a family that is no platform of the table.
        """
        return platform_named(self.family)

    def usable_hbm_per_device(self) -> int:
        """Bytes of HBM that a program may use on one JAX device."""
        return self.usable_hbm // self.devices_per_chip

    def offers_side(self, size: int) -> bool:
        """Whether slices have a torus axis of so many chips."""
        return size in self.sides or (0 < size <= self.max_axis and self._step > 0 and size % self._step == 0)

    def rents(self, shape: tuple[int, ...]) -> bool:
        """Whether slices of this shape, whichever way round, can be rented: a shape of the cloud's types, or of whole cubes where those are
        free; of switched chips, a part of a node or whole nodes. Of a chip that no cloud names, every shape that is a torus."""
        count = math.prod(shape)
        if self.torus_dims == 0:
            return count <= self.node_size or count % self.node_size == 0
        if self.cloud is None:
            return all(map(self.offers_side, shape))
        cubes = self.cloud.free_shape and all(side % self.wrap_multiple == 0 for side in shape)
        return self.cloud.number_of(shape) is not None or (cubes and count <= self.cloud.most_chips)

    def rented_shapes(self, most_chips: int) -> Iterator[tuple[int, ...]]:
        """Shapes that can be rented, each the way round that the cloud writes it: fewest chips first, the most cubic first among equals.
        Of switched chips, powers of two."""
        if self.torus_dims == 0:
            sizes = [1 << power for power in range(most_chips.bit_length()) if 1 << power <= most_chips]
            yield from ((size,) for size in sizes if self.rents((size,)))
            return
        sides = [side for side in range(1, min(most_chips, _LONGEST_SIDE) + 1) if self.offers_side(side)]
        shapes = itertools.combinations_with_replacement(sides, self.torus_dims)
        found = [shape for shape in shapes if math.prod(shape) <= most_chips and self.rents(shape)]
        written = {tuple(sorted(shape)): shape for shape in self.cloud.shapes.values()} if self.cloud is not None else {}
        yield from (written.get(shape, shape) for shape in sorted(found, key=lambda shape: (math.prod(shape), max(shape))))

    @property
    def _step(self) -> int:
        return self.side_multiple or (0 if self.sides else 1)

    @property
    def sides_rule(self) -> str:
        """The lengths of its torus axes in words, `1, 2 or a multiple of 4`."""
        words = [*map(str, self.sides), *([f"a multiple of {self._step}"] if self._step else [])]
        return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


TABLE = "hardware/hardware.toml"
NOT_IN_FILES = frozenset({"rates", "cloud", "price", "machines"})
"""Fields of a chip that are no keys of `[chip]` in a hardware file."""
_LONGEST_SIDE = 64  # of a torus axis
_PARTS: Mapping[str, type] = {"cloud": CloudType, "price": Price}


@functools.cache
def chips() -> Mapping[str, Chip]:
    """The shipped hardware table, name → chip."""
    table = tomllib.loads(resources.package_file(TABLE).read_text())
    offences: list[str] = []
    found = {name: _row(name, row, offences) for name, row in table.items()}
    raise_offences(offences)
    return {name: Chip(name=name, **row) for name, row in found.items()}


def _row(name: str, row: Mapping[str, Any], offences: list[str]) -> dict[str, Any]:
    """The fields of a chip that are not `false`; unknown keys join `offences`."""
    kept = _known(f"{TABLE} [{name}]", row, Chip, {"name", "rates"}, offences)
    kept["machines"] = tuple(kept.get("machines", {}).items())
    for key, kind in _PARTS.items():
        if key in kept:
            part = _known(f"{TABLE} [{name}.{key}]", kept[key], kind, set(), offences)
            kept[key] = kind(**{key: tuple(value.items()) if isinstance(value, dict) else value for key, value in part.items()})
    return kept


def _known(where: str, row: Mapping[str, Any], kind: Any, without: set[str], offences: list[str]) -> dict[str, Any]:
    known = {each.name: each.type for each in fields(kind) if each.name not in without}
    offences += [f"{where}: unknown key '{key}'{nearest(key, known)}" for key in row if key not in known]
    there = {key: value for key, value in row.items() if value is not False or known.get(key) == "bool"}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in there.items()}  # a chip can be hashed


def chip_of_kind(device_kind: str) -> Chip:
    """The chip of a JAX device by its `device_kind`.

    Raises:
        InvalidInput: a kind that the table does not know.
    """
    kind = device_kind.lower()
    exact = [chip for chip in chips().values() if kind in chip.device_kinds]
    partly = [chip for chip in chips().values() if chip.platform.partial_kinds and any(part in kind for part in chip.device_kinds)]
    if not exact + partly:
        raise InvalidInput(f"no chip of the hardware table is a {device_kind!r}; known: {', '.join(chips())}")
    return (exact + partly)[0]
