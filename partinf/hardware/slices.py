"""Slices: chips joined in one shape, and which mesh axes they offer.

A slice is named `CHIP:SHAPE` (`v4:4x4x4`, `h200:8`, `cpu:2x2x2`) or as a cloud names it (`v5litepod-16`, `v5e-16`, `h100x8`,
`a3-highgpu-8g`), a multi-slice `…*COUNT`. Its mesh axes are its torus axes,
factors of them, or, where a switch joins the devices, any factorisation of their number; the two devices of a TPU7x chip are an axis
`core` of their own and the network between slices is the axis `dcn`. `MeshAxis` keeps what a cost model must know of an axis: its
size, its stride along the torus axis that it is cut from, and whether that axis wraps around.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from partinf.axes import is_axis_name
from partinf.foundation.errors import InvalidInput, nearest, raise_offences
from partinf.foundation.limits import MAX_AXES, MAX_DEVICES
from partinf.hardware.chips import Chip, chips
from partinf.hardware.platform import memory_of_virtual_devices

TORUS_NAMES = ("x", "y", "z")
DCN_AXIS = "dcn"
CORE_AXIS = "core"


class Link(StrEnum):
    """What joins neighbours along a mesh axis."""

    TORUS = "torus"
    SWITCH = "switch"
    CORE = "core"
    DCN = "dcn"


@dataclass(frozen=True)
class MeshAxis:
    """One axis of a device mesh.

    Attributes:
        link: what joins neighbours along it.
        torus: name of the torus axis that it is, or is a factor of; its own name otherwise.
        stride: distance of neighbours in devices along that torus axis.
        torus_size: size of that whole torus axis.
        wraps: whether the torus axis has wraparound links.
    """

    name: str
    size: int
    link: Link
    torus: str
    stride: int = 1
    torus_size: int = 0
    wraps: bool = False


@dataclass(frozen=True)
class Slice:
    """Chips joined in one shape, and the mesh axes by which they are addressed.

    Attributes:
        shape: chips along each torus axis; `(n,)` or any factorisation of n for switched chips.
        axes: the mesh axes, in mesh order: `dcn` first, torus axes or their factors, `core` last.
        num_slices: slices joined by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    axes: tuple[MeshAxis, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        """The name that `parse_slice` reads, without the factorisation."""
        shape = "x".join(map(str, self.shape))
        return f"{self.chip.name}:{shape}" + (f"*{self.num_slices}" if self.num_slices > 1 else "")

    @property
    def cloud_name(self) -> str | None:
        """The type by which Google Cloud rents it, `v5litepod-16`; None where no type has this shape, whichever way round."""
        cloud = self.chip.cloud
        number = None if cloud is None else cloud.number_of(self.shape)
        if cloud is None or number is None:
            return None
        return f"{cloud.prefix}-{number}" + (f"*{self.num_slices}" if self.num_slices > 1 else "")

    @property
    def not_rented(self) -> str | None:
        """Why this slice cannot be rented, in a line; None if it can be, or if the devices are virtual."""
        if self.chip.rents(self.shape) or self.chip.platform.virtual:
            return None
        count = math.prod(self.shape)
        if self.chip.torus_dims == 0:
            node = self.chip.node_size
            return f"slice {self.name}: {self.chip.name} is rented in nodes of {node}, of which {count} devices fill no whole number"
        sizes = {math.prod(shape): shape for shape in reversed([*self.chip.rented_shapes(2 * count)])}
        near = sorted(sizes, key=lambda size: (abs(size - count), size))[:2]
        names = " or ".join(f"{self.chip.name}:{'x'.join(map(str, sizes[size]))}" for size in sorted(near))
        return f"slice {self.name}: no cloud rents {self.chip.name} in this shape; the nearest in size are {names}"

    @property
    def mesh(self) -> str:
        """The mesh axes as text, `x:4,y:4,z:4`."""
        return ",".join(f"{axis.name}:{axis.size}" for axis in self.axes)

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip

    @functools.cached_property
    def scatter_order(self) -> tuple[str, ...]:
        """The mesh axes in the order in which a reduce-scatter over several takes them: inner networks first, since the first one moves
        most; axes of a torus, all alike, from the first, whose part of a dimension lies in one piece."""
        reach = {Link.CORE: 0, Link.TORUS: 1, Link.SWITCH: 2, Link.DCN: 3}
        return tuple(axis.name for axis in sorted(self.axes, key=lambda a: (reach[a.link], a.stride if a.link is Link.SWITCH else 0)))

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Axis name → size, in mesh order."""
        return {axis.name: axis.size for axis in self.axes}

    def with_mesh(self, text: str) -> Slice:
        """The same slice under another factorisation of its axes: `x0:4,x1:4,y:16`, or `4x2` for switched chips. What is no factor, `dcn`
        and `core`, may be named as it is, as `mesh` names it.

        Raises:
            InvalidInput: naming every factor that does not fit, and the sizes that would.
        """
        outer, inner = _outer_axes(self), _inner_axes(self.chip)
        fixed = {f"{axis.name}:{axis.size}" for axis in outer + inner}
        factors = ",".join(word for word in text.split(",") if word.strip() not in fixed)
        return replace(self, axes=outer + _factored(self, factors) + inner)


def parse_slice(text: str, mesh: str | None = None, measured: Chip | None = None) -> Slice:
    """Read `CHIP:SHAPE`, a cloud's name or `CHIPxNUMBER` of switched chips, each with `*COUNT` for several slices, optionally under a
    factorisation (see `Slice.with_mesh`).

    Args:
        measured: a chip of a hardware file, which stands for the table's chip of its name.

    Raises:
        InvalidInput: an unknown chip or name (nearest one), a shape that is not a torus of the chip (valid sizes), a wrong factorisation.
    """
    known = {**chips(), measured.name: measured} if measured is not None else chips()
    name, count = re.fullmatch(r"(.*?)(?:\*([0-9]{1,18}))?", text.strip(), re.DOTALL).groups()  # type: ignore[union-attr]  # takes all
    spelt = _cloud_names().get(name, name)
    if switched := re.fullmatch(r"([a-z0-9-]+)x([0-9]{1,18})", name):
        spelt = f"{switched[1]}:{switched[2]}" if switched[1] in known and known[switched[1]].torus_dims == 0 else name
    match = re.fullmatch(r"(?P<chip>[a-z0-9-]+):(?P<shape>[0-9]{1,18}(?:x[0-9]{1,18})*)", spelt)
    if match is None:
        raise InvalidInput(f"slice '{text}': {_expected(name)}")
    if match["chip"] not in known:
        raise InvalidInput(f"slice '{text}': unknown chip '{match['chip']}'{nearest(match['chip'], known)}")
    chip = known[match["chip"]]
    shape = tuple(int(size) for size in match["shape"].split("x"))
    slices = int(count or 1)
    raise_offences(_shape_offences(text, chip, shape, slices))
    return make_slice(chip, shape, slices, mesh)


@functools.cache
def _cloud_names() -> Mapping[str, str]:
    """What clouds call slices → `CHIP:SHAPE`: types of TPUs by the cloud's prefix and by the chip's own name, machines with GPUs."""
    names: dict[str, str] = {}
    for chip in chips().values():
        types = chip.cloud.topologies if chip.cloud is not None else ()
        for prefix in {chip.name, chip.cloud.prefix} if chip.cloud is not None else ():
            names |= {f"{prefix}-{number}": f"{chip.name}:{topology}" for number, topology in types}
        names |= {machine: f"{chip.name}:{devices}" for machine, devices in chip.machines}
    return names


def _expected(name: str) -> str:
    """What a slice may be called, for a name that is none: the types of the chip whose type it might be, or the nearest name."""
    prefix, dash, _ = name.partition(":")[0].rpartition("-")
    for chip in chips().values():
        if dash and ":" not in name and chip.cloud is not None and prefix in (chip.name, chip.cloud.prefix):
            types = ", ".join(f"{prefix}-{number}" for number in chip.cloud.shapes)
            return f"no such type; {prefix} comes as {types}, other shapes as {chip.name}:{chip.cloud.topologies[-1][1]}"
    examples = "CHIP:SHAPE such as v4:4x4x4, h200:8 or cpu:2x2x2, a cloud's name such as v5litepod-16, v6e-8 or h100x8, or local"
    return f"expected {examples}{nearest_chip(name)}"


def make_slice(chip: Chip, shape: tuple[int, ...], num_slices: int = 1, mesh: str | None = None) -> Slice:
    """A slice of a given chip (from the table or calibrated); `shape` is taken as valid."""
    bare = Slice(chip, shape, (), num_slices)
    default = ",".join(f"{name}:{size}" for name, size in zip(_torus_names(bare), shape, strict=True))
    return bare.with_mesh(mesh or default)


def on_this_machine(slice_: Slice) -> Slice:
    """The slice as it runs here: virtual devices have no more memory together than the machine."""
    if not slice_.chip.platform.virtual:
        return slice_
    total, usable = memory_of_virtual_devices(slice_.num_devices)
    chip = replace(slice_.chip, hbm=min(total, slice_.chip.hbm), usable_hbm=min(usable, slice_.chip.usable_hbm))
    return replace(slice_, chip=chip)


def nearest_chip(text: str) -> str:
    """The hint for a slice whose chip part may be misspelt."""
    head = text.split(":")[0]
    near = nearest(head, _cloud_names())
    return "" if head in chips() else near if near.startswith("; did") and ":" not in text else nearest(head, chips())


def _shape_offences(text: str, chip: Chip, shape: tuple[int, ...], count: int) -> list[str]:
    offences = []
    if count < 1:
        offences.append(f"slice '{text}': {count} slices; at least 1 is needed")
    devices = math.prod(shape) * count * chip.devices_per_chip
    if devices > MAX_DEVICES:
        return [f"slice '{text}': {devices:,} devices; at most {MAX_DEVICES:,} can be planned for"]
    if chip.torus_dims == 0:
        if any(size < 1 for size in shape) or len(shape) > 3:
            offences.append(f"slice '{text}': a switched slice has one to three axes of at least 1 device")
        return offences
    if len(shape) != chip.torus_dims:
        example = "x".join(["4"] * chip.torus_dims)
        wrong = f"{chip.name} is a {chip.torus_dims}D torus, the shape has {len(shape)} axes"
        offences.append(f"slice '{text}': {wrong}; for example {chip.name}:{example}")
    for size in shape:
        if not chip.offers_side(size):
            below = max((s for s in range(1, size) if chip.offers_side(s)), default=1)
            above = min((s for s in range(size + 1, size + 9) if chip.offers_side(s)), default=None)
            near = f"{below} or {above}" if above else f"{below}"
            no_side = f"{chip.name} has no torus axis of {size} chips; valid sides are {chip.sides_rule}, nearest {near}"
            offences.append(f"slice '{text}': {no_side}")
    return offences


def _torus_names(slice_: Slice) -> tuple[str, ...]:
    return TORUS_NAMES[: len(slice_.shape)]


def _outer_axes(slice_: Slice) -> tuple[MeshAxis, ...]:
    if slice_.num_slices == 1:
        return ()
    return (MeshAxis(DCN_AXIS, slice_.num_slices, Link.DCN, DCN_AXIS, 1, slice_.num_slices),)


def _inner_axes(chip: Chip) -> tuple[MeshAxis, ...]:
    if chip.devices_per_chip == 1:
        return ()
    return (MeshAxis(CORE_AXIS, chip.devices_per_chip, Link.CORE, CORE_AXIS, 1, chip.devices_per_chip),)


def _factored(slice_: Slice, text: str) -> tuple[MeshAxis, ...]:
    factors = _parse_factors(slice_, text)
    if slice_.chip.torus_dims == 0:
        return _switched_axes(slice_, text, factors)
    axes: list[MeshAxis] = []
    offences = []
    wrapped = _wrapped_sides(slice_)
    for torus, side in zip(_torus_names(slice_), slice_.shape, strict=True):
        mine = [(name, size) for name, size in factors if name.rstrip("0123456789") == torus]
        if math.prod(size for _, size in mine) != side:
            found = " · ".join(f"{name}:{size}" for name, size in mine) or "nothing"
            offences.append(f"mesh '{text}': the factors of torus axis {torus} must multiply to {side}, found {found}")
        stride = side
        for name, size in mine:
            stride //= max(size, 1)
            axes.append(MeshAxis(name, size, Link.TORUS, torus, stride, side, side in wrapped))
    strange = [name for name, _ in factors if name.rstrip("0123456789") not in _torus_names(slice_)]
    offences += [f"mesh '{text}': axis '{name}' is no factor of {', '.join(_torus_names(slice_))}" for name in strange]
    raise_offences(offences)
    return tuple(axes)


def _wrapped_sides(slice_: Slice) -> set[int]:
    """Lengths of the torus axes that wrap around. A 3D slice is a torus only when it is made of whole cubes, else a mesh throughout."""
    multiple = slice_.chip.wrap_multiple
    whole = {side for side in slice_.shape if side > 1 and side % multiple == 0}
    return whole if slice_.chip.torus_dims == 2 or all(side in whole for side in slice_.shape) else set()


def _switched_axes(slice_: Slice, text: str, factors: list[tuple[str, int]]) -> tuple[MeshAxis, ...]:
    total = math.prod(slice_.shape)
    if math.prod(size for _, size in factors) != total:
        raise InvalidInput(f"mesh '{text}': the axes must multiply to the {total} devices of {slice_.name}")
    stride, axes = total, []
    for name, size in factors:
        stride //= size
        axes.append(MeshAxis(name, size, Link.SWITCH, "switch", stride, total, True))
    return tuple(axes)


def _parse_factors(slice_: Slice, text: str) -> list[tuple[str, int]]:
    words = [word.strip() for word in text.split(",")]
    if len(words) == 1 and re.fullmatch(r"[0-9]{1,18}(x[0-9]{1,18})*", words[0]):
        sizes = [int(size) for size in words[0].split("x")]
        if slice_.chip.torus_dims and tuple(sizes) != slice_.shape:
            raise InvalidInput(f"mesh '{text}': name the factors of {slice_.name}'s torus axes, for example x0:2,x1:2,y:4")
        if len(sizes) > len(TORUS_NAMES):
            raise InvalidInput(f"mesh '{text}': at most {len(TORUS_NAMES)} unnamed axes; name them as in a:2,b:2,c:2,d:2")
        words = [f"{name}:{size}" for name, size in zip(TORUS_NAMES, sizes, strict=False)]
    if len(words) > MAX_AXES:
        raise InvalidInput(f"mesh of {len(words)} axes; at most {MAX_AXES} are possible")
    factors: list[tuple[str, int]] = []
    offences = []
    for word in words:
        match = re.fullmatch(r"([a-z][a-z0-9]*):([0-9]{1,18})", word)
        if match is None or int(match[2]) < 1:
            offences.append(f"mesh '{text}': '{word}' is not AXIS:SIZE, for example x:4")
        elif not is_axis_name(match[1]) or match[1] in (DCN_AXIS, CORE_AXIS):
            offences.append(f"mesh '{text}': '{match[1]}' cannot name a factor")
        elif match[1] in [name for name, _ in factors]:
            offences.append(f"mesh '{text}': axis '{match[1]}' is named twice")
        else:
            factors.append((match[1], int(match[2])))
    raise_offences(offences)
    return factors
