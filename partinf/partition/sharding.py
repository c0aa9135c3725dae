"""Where layouts become JAX shardings: the only module that builds `Mesh` and `PartitionSpec`.

Parameters, cache and step arguments are declared by letters (`partinf.axes`); this module knows which mesh axes split which letter
under a plan. It also finds the devices: local ones, virtual CPU devices, or abstract ones for tracing without any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from partinf.foundation.errors import InvalidInput
from partinf.hardware.chips import Chip, chip_of_kind
from partinf.hardware.hardware_file import default_path, read_hardware
from partinf.hardware.platform import CPU, Platform, has_accelerator, memory_of_virtual_devices, platform_named
from partinf.hardware.slices import TORUS_NAMES, Link, Slice, make_slice
from partinf.plans import Plan

_MEMORY_STEP = 1 << 28


def devices_here() -> Sequence[jax.Device]:
    """jax's devices; those of the CPU where no accelerator shows, because an installed libtpu would look for a TPU and complain."""
    if not jax.config.jax_platforms and not has_accelerator():
        jax.config.update("jax_platforms", CPU.name)
    return jax.devices()


def device_mesh(plan: Plan, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of real devices for the plan's slice, axes in mesh order.

    Args:
        devices: the devices to use; the first ones of those here if not given.

    Raises:
        InvalidInput: if there are fewer devices than the slice has.
    """
    sizes = plan.axis_sizes
    count = math.prod(sizes.values())
    if devices is None:
        devices = devices_here()
    if len(devices) < count:
        here = f"{len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}"
        raise InvalidInput(
            f"slice {plan.slice.name} needs {count} devices, here are {here}; "
            f"use slice local, or set JAX_NUM_CPU_DEVICES={count} for virtual ones"
        )
    if platform_named(devices[0].platform).coordinates and plan.slice.chip.platform.coordinates and len(devices) == count:
        devices = by_place(plan.slice, devices)
    return mesh_in_order(plan.slice, devices[:count])


def platform_of(mesh: Mesh) -> Platform:
    """What the devices of a mesh want."""
    return platform_named(mesh.devices.flat[0].platform)


def mesh_in_order(slice_: Slice, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of devices that are given row-major over the slice's mesh axes."""
    sizes = slice_.axis_sizes
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def by_place(slice_: Slice, devices: Sequence[Any]) -> list[Any]:
    """TPU devices row-major over the slice's mesh axes, each where its coordinates say.

    Axis x of the mesh is axis x of the torus and a factor of it a digit of that coordinate, so a collective over a mesh axis runs over
    the links that the cost model prices and the proof compiles for.
    """
    corner = np.array([device.coords for device in devices]).min(axis=0)

    def digits(device: Any) -> tuple[int, ...]:
        found = []
        for axis in slice_.axes:
            if axis.link is Link.TORUS:
                dimension = TORUS_NAMES.index(axis.torus)
                found.append(int(device.coords[dimension] - corner[dimension]) // axis.stride % axis.size)
            else:
                found.append(device.core_on_chip if axis.link is Link.CORE else device.slice_index)
        return tuple(found)

    return sorted(devices, key=digits)


def abstract_mesh(plan: Plan) -> AbstractMesh:
    """The plan's mesh without devices, for tracing."""
    sizes = plan.axis_sizes
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def spec(plan: Plan, letters: str) -> P:
    """The PartitionSpec of an array whose dimensions carry these letters; `.` marks a dimension that is never split."""
    axes = plan.letter_axes
    return P(*(axes.get(letter, ()) or None for letter in letters))


def sharding(plan: Plan, mesh: Mesh | AbstractMesh, letters: str) -> NamedSharding:
    """`spec` bound to a mesh."""
    return NamedSharding(mesh, spec(plan, letters))


def in_order(placed: NamedSharding, shape: Sequence[int], turned: bool) -> Format:
    """A sharding of arrays of this shape that lie row by row in memory, or with their last two dimensions exchanged."""
    *before, rows, columns = range(len(shape))
    return Format(Layout((*before, columns, rows) if turned else (*before, rows, columns)), placed)


def dimensions(mesh: Mesh | AbstractMesh, *axes: Sequence[str]) -> NamedSharding:
    """Of an array whose dimensions are split over these mesh axes, major first."""
    return NamedSharding(mesh, P(*(tuple(each) or None for each in axes)))


WHOLE = P()
"""Of an array that every device has whole."""


def whole(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """`WHOLE` bound to a mesh."""
    return NamedSharding(mesh, WHOLE)


def over_all(mesh: Mesh) -> P:
    """Of an array whose first dimension is split over all axes: a part of its own for every device."""
    return P(mesh.axis_names)


def local_slice(mesh: str | None = None, chip: Chip | None = None) -> Slice:
    """The local devices, as a slice: a torus by its chips' coordinates, or one switched axis.

    CPU devices are virtual ones. Eight switched devices make a 2×2×2 mesh unless another is requested (`4x2`).

    Args:
        chip: what the devices are; if not given, as the user's hardware file for so many of them says, or else the hardware table.

    Raises:
        InvalidInput: devices that the hardware table does not know, or a chip that is another device.
    """
    devices = devices_here()
    kind = devices[0].device_kind
    if chip is None:
        file = default_path(kind, len(devices))
        chip = read_hardware(file) if file.is_file() else chip_of_kind(kind)
    elif chip.rates is not None and chip.rates.device_kind != kind:
        raise InvalidInput(f"the hardware file is of {chip.rates.device_kind}, the devices here are {kind}")
    if chip.torus_dims:
        corners = np.array([device.coords for device in devices])
        shape = tuple(int(side) for side in corners.max(axis=0) - corners.min(axis=0) + 1)[: chip.torus_dims]
    else:
        shape = (2, 2, 2) if len(devices) == 8 else (len(devices),)
    return make_slice(_with_memory_here(chip, devices), shape, mesh=mesh)


def _with_memory_here(chip: Chip, devices: Sequence[jax.Device]) -> Chip:
    """The chip with the memory that this process finds: virtual CPU devices share the machine's, a GPU tells its own."""
    if platform_named(devices[0].platform).virtual:
        total, usable = memory_of_virtual_devices(len(devices))
        return replace(chip, hbm=total, usable_hbm=usable)
    here = next(device for device in devices if device.process_index == jax.process_index())
    limit = (here.memory_stats() or {}).get("bytes_limit")
    # Rounded, so that hosts with other processes on their devices make the same plan.
    return chip if limit is None else replace(chip, usable_hbm=int(limit) // _MEMORY_STEP * _MEMORY_STEP * chip.devices_per_chip)


def put(array: np.ndarray, target: NamedSharding) -> jax.Array:
    """A host array onto its devices, each device receiving its own part alone; every process of a mesh that spans several has it whole."""
    if target.is_fully_addressable:
        return jax.device_put(array, target)
    return jax.make_array_from_callback(array.shape, target, lambda index: array[index])
