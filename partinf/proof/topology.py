"""The devices that a proof compiles for, in mesh order: those of a TPU slice, as the TPU compiler describes them without any chip, or the
local GPUs or virtual CPU devices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import Link, Slice

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from partinf.plans import Plan


def describe(slice_: Slice) -> tuple[str, dict[str, Any]]:
    """Name and options for `jax.experimental.topologies.get_topology_desc`."""
    chip, options = slice_.chip, dict[str, Any]()
    if chip.compiler_config:
        options["chip_config_name"] = chip.compiler_config
    # The compiler takes a 3D slice for a mesh unless it is given the wrap-around links; it knows those of a 2D slice.
    if chip.torus_dims == 3 and all(axis.wraps for axis in slice_.axes if axis.link is Link.TORUS):
        options["wrap"] = (True, True, True)
    if math.prod(slice_.shape) < math.prod(chip.host_shape):
        options["chips_per_host_bounds"] = (*slice_.shape, 1, 1)[:3]
    if slice_.num_slices > 1:
        options["num_slices"] = slice_.num_slices
    return chip.name + ":" + "x".join(map(str, slice_.shape)), options


def mesh_of(plan: Plan) -> Mesh:
    """The mesh of a plan: of described devices for a TPU slice, of local ones for others.

    Raises:
        InvalidInput: a slice for which the TPU compiler knows no topology, or that has more devices than there are here.
    """
    from partinf.partition.sharding import device_mesh, mesh_in_order

    platform = plan.slice.chip.platform
    if platform.described:
        return mesh_in_order(plan.slice, _described(plan.slice))
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
