"""TPU types: from `v5litepod-16` to chips, hosts and a topology that partinf.hardware.slices knows, and back from a slice to a type."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from partinf.foundation.errors import InvalidInput, nearest
from partinf.hardware.chips import CloudType, chips
from partinf.hardware.slices import Slice, parse_slice


@dataclass(frozen=True)
class TpuType:
    """A slice as Google Cloud names it.

    Attributes:
        name: the accelerator type, `v5litepod-16`.
        slice: the same slice as partinf names it; its shape is the topology.
        default_topology: whether the type alone gives this topology.
    """

    name: str
    slice: Slice
    default_topology: bool

    @property
    def cloud(self) -> CloudType:
        """How types of this chip are named."""
        assert self.slice.chip.cloud is not None, "a type is one of a chip that has some"
        return self.slice.chip.cloud

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
        return self.cloud.num_hosts(self.num_chips)

    @property
    def chips_per_host(self) -> int:
        return self.num_chips // self.num_hosts


def generations() -> Mapping[str, tuple[str, CloudType]]:
    """Prefix of the type → chip of the hardware table, and how its types are named."""
    return {chip.cloud.prefix: (name, chip.cloud) for name, chip in chips().items() if chip.cloud is not None}


def parse_type(name: str, topology: str | None = None) -> TpuType:
    """Read a type, optionally in another shape of as many chips.

    Raises:
        InvalidInput: an unknown type (nearest name), or a topology that the type does not have (those it has).
    """
    prefix, _, number = name.rpartition("-")
    known = [f"{prefix}-{number}" for prefix, (_, cloud) in generations().items() for number, _ in cloud.topologies]
    if name not in known:
        _, cloud = generations().get(prefix, ("", None))
        sizes = f"; {prefix} comes as {', '.join(number for number, _ in cloud.topologies)}" if cloud else nearest(name, known)
        raise InvalidInput(f"type '{name}': no such TPU type{sizes}")
    chip, cloud = generations()[prefix]
    usual_topology = dict(cloud.topologies)[number]
    default = parse_slice(f"{chip}:{usual_topology}")
    if topology is None or topology == usual_topology:
        return TpuType(name, default, True)
    usual = f"'{name}' is {default.num_chips} chips as {usual_topology}"
    if not re.fullmatch(r"\d+(x\d+)*", topology):
        raise InvalidInput(f"topology '{topology}': expected chips along each axis; {usual}")
    if not cloud.free_shape:
        raise InvalidInput(f"topology '{topology}': {prefix} types have one topology each; {usual}")
    count = math.prod(int(side) for side in topology.split("x"))
    if count != default.num_chips:
        raise InvalidInput(f"topology '{topology}': {count} chips, but {usual}")
    slice_ = parse_slice(f"{chip}:{topology}")
    if slice_.not_rented:
        raise InvalidInput(f"topology '{topology}': other shapes than those of types are made of whole cubes, and {usual}")
    return TpuType(name, slice_, False)


def type_of_slice(slice_: Slice) -> TpuType:
    """The type that gives a plan's slice.

    Raises:
        InvalidInput: no TPU type has this chip and shape.
    """
    cloud = slice_.chip.cloud
    if cloud is not None and slice_.num_slices == 1:
        if slice_.cloud_name is not None:
            return parse_type(slice_.cloud_name)
        number = str(slice_.num_chips * cloud.cores_per_number)
        if slice_.not_rented is None and number in cloud.shapes:
            return parse_type(f"{cloud.prefix}-{number}", "x".join(map(str, slice_.shape)))
    known = ", ".join(chip for chip, _ in generations().values())
    raise InvalidInput(f"slice '{slice_.name}': no TPU type gives it; TPU VMs come as one slice of {known} in the shapes of hardware.toml")
