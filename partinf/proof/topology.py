"""The devices that a proof compiles for, in mesh order: those of a TPU slice that is not here, as the TPU compiler describes them, or the
GPUs or virtual CPU devices that are here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from partinf.errors import InvalidInput
from partinf.hardware.slices import Slice

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from partinf.plans import Plan

_MEGACORE = ("v4",)  # two cores that are programmed as one device
_LONGEST_UNLINKED = 4  # v4 and v5p: sides from here on are wired as rings


def describe(slice_: Slice) -> tuple[str, dict[str, Any]]:
    """Name and options for `jax.experimental.topologies.get_topology_desc`."""
    three = slice_.chip.torus_dims == 3
    options: dict[str, Any] = {}
    if slice_.chip.name in _MEGACORE:
        options["chip_config_name"] = "megacore"
    if three and min(slice_.shape) >= _LONGEST_UNLINKED:
        options["wrap"] = (True, True, True)
    if math.prod(slice_.shape) < 4:
        options["chips_per_host_bounds"] = (*slice_.shape, 1, 1)[:3]
    if slice_.num_slices > 1:
        options["num_slices"] = slice_.num_slices
    return slice_.chip.name + ":" + "x".join(map(str, slice_.shape)), options


def mesh_of(plan: Plan) -> Mesh:
    """The mesh of a plan: of devices that are not here for a TPU slice, of those that are here for others.

    Raises:
        InvalidInput: a slice for which the TPU compiler knows no topology, or that has more devices than there are here.
    """
    from partinf.partition.sharding import device_mesh, mesh_in_order

    platform = plan.slice.chip.platform
    if platform.described:
        return mesh_in_order(plan, _described(plan.slice))
    import jax

    if not platform.virtual and jax.devices()[0].platform != platform.name:
        raise InvalidInput(f"slice {plan.slice.name}: a proof for {platform.name.upper()}s compiles on them, and there is none here")
    return device_mesh(plan)


def _described(slice_: Slice) -> list[Any]:
    """The devices of a TPU slice, row-major over its mesh axes."""
    from jax.experimental import topologies

    from partinf.partition.sharding import by_place

    name, options = describe(slice_)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:
        raise InvalidInput(f"slice {slice_.name}: the TPU compiler has no such topology: {str(error).splitlines()[0]}") from error
    if len(devices) != slice_.num_devices:
        raise InvalidInput(f"slice {slice_.name}: {slice_.num_devices} devices expected, the TPU compiler describes {len(devices)}")
    return by_place(slice_, devices)
