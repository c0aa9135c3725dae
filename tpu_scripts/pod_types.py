"""TPU types: from `v5litepod-16` to chips, hosts and a topology that partinf.hardware.slices knows, and back from a slice to a type."""

from __future__ import annotations

import functools
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass

from pod_checkout import HERE

from partinf.errors import InvalidInput, nearest
from partinf.hardware.slices import Slice, parse_slice


@dataclass(frozen=True)
class Generation:
    """One row of tpu_types.toml, where its fields are explained."""

    prefix: str
    chip: str
    cores_per_number: int
    chips_per_host: int
    whole_host: int
    free_shape: bool
    runtime: str
    gke_accelerator: str
    topologies: Mapping[str, str]
    source: str


@dataclass(frozen=True)
class TpuType:
    """A slice as Google Cloud names it.

    Attributes:
        name: the accelerator type, `v5litepod-16`.
        slice: the same slice as partinf names it; its shape is the topology.
        default_topology: whether the type alone gives this topology.
    """

    name: str
    generation: Generation
    slice: Slice
    default_topology: bool

    @property
    def topology(self) -> str:
        """Chips along each torus axis, `4x4`."""
        return "x".join(map(str, self.slice.shape))

    @property
    def num_chips(self) -> int:
        return self.slice.num_chips

    @property
    def num_hosts(self) -> int:
        """Virtual machines, each running one process."""
        chips: int = self.slice.num_chips
        return 1 if chips <= self.generation.whole_host else chips // self.generation.chips_per_host

    @property
    def chips_per_host(self) -> int:
        return self.num_chips // self.num_hosts


@functools.cache
def generations() -> Mapping[str, Generation]:
    """Prefix of the type → generation."""
    table = tomllib.loads((HERE / "tpu_types.toml").read_text())
    return {prefix: Generation(prefix=prefix, **row) for prefix, row in table.items()}


def parse_type(name: str, topology: str | None = None) -> TpuType:
    """Read a type, optionally in another shape of as many chips.

    Raises:
        InvalidInput: an unknown type (nearest name), or a topology that the type does not have (those it has).
    """
    prefix, _, number = name.rpartition("-")
    known = [f"{prefix}-{number}" for prefix, generation in generations().items() for number in generation.topologies]
    if name not in known:
        sizes = f"; {prefix} comes as {', '.join(generations()[prefix].topologies)}" if prefix in generations() else nearest(name, known)
        raise InvalidInput(f"type '{name}': no such TPU type{sizes}")
    generation = generations()[prefix]
    default = parse_slice(f"{generation.chip}:{generation.topologies[number]}")
    if topology is None or topology == generation.topologies[number]:
        return TpuType(name, generation, default, True)
    usual = f"'{name}' is {default.num_chips} chips as {generation.topologies[number]}"
    if not re.fullmatch(r"\d+(x\d+)*", topology):
        raise InvalidInput(f"topology '{topology}': expected chips along each axis; {usual}")
    if not generation.free_shape:
        raise InvalidInput(f"topology '{topology}': {generation.prefix} types have one topology each; {usual}")
    chips = math.prod(int(side) for side in topology.split("x"))
    if chips != default.num_chips:
        raise InvalidInput(f"topology '{topology}': {chips} chips, but {usual}")
    return TpuType(name, generation, parse_slice(f"{generation.chip}:{topology}"), False)


def type_of_slice(slice_: Slice) -> TpuType:
    """The type that gives a plan's slice.

    Raises:
        InvalidInput: no TPU type has this chip and shape.
    """
    for generation in generations().values():
        if generation.chip != slice_.chip.name or slice_.num_slices != 1:
            continue
        shape = "x".join(map(str, slice_.shape))
        number = str(slice_.num_chips * generation.cores_per_number)
        for candidate in (shape, "x".join(map(str, sorted(slice_.shape)))):
            if generation.topologies.get(number) == candidate:
                return parse_type(f"{generation.prefix}-{number}")
        if generation.free_shape and number in generation.topologies:
            return parse_type(f"{generation.prefix}-{number}", shape)
    chips = ", ".join(generation.chip for generation in generations().values())
    raise InvalidInput(f"slice '{slice_.name}': no TPU type gives it; TPU VMs come as one slice of {chips} in the shapes of tpu_types.toml")
