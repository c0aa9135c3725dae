"""How long a collective takes: on the axes of a torus, through a switch, between the cores of a chip, or between slices.

Two bandwidth models, and every figure says which one it uses:

* `axis`: each torus axis moves bytes both ways at W = 2 · link; a collective over k whole torus axes uses the links of all k at once.
  An axis without wraparound has half of that. A factor of a torus axis is a line (no wraparound) when it is contiguous; when its
  neighbours are `stride` chips apart, `stride` such rings share each link.
* `paper`: all links of a chip add up whichever axes are used ("Efficiently Scaling Transformer Inference", App. A.1; 270 GB/s on v4).

All-gather and reduce-scatter move D · (K-1)/K bytes through each device, where D is the output of the former and the input of the
latter; an all-reduce is one of each. An all-to-all of b bytes per device on a ring of K loads its links with b · K / 4 (scaling book,
chapter 3). A permute sends b to the next device along the axes, over one link one way, or through the slowest network that any of them
crosses. Hops bound small collectives from below (`max(hops, bytes)`). Where the time of a hop was measured it is added, and a fixed time of
the collective to it: a ring waits at every hop, an all-to-all on a torus sends at once and waits for the chip's own latency alone, and
through a switch every collective is one step, or where that was measured a ring as well, with a hop for each further device. The hop that
was measured is one between the chips of a slice or node; a hop between hosts keeps its own, which no calibration of a chip knows.
On devices that were measured with `partinf calibrate`, each kind of collective has a time of its own by the number of devices, and a factor
on that of its bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from partinf.cost.ledger import Op
from partinf.foundation.rounding import ceil_div
from partinf.hardware.chips import Chip
from partinf.hardware.rates import Rates
from partinf.hardware.slices import Link, MeshAxis, Slice

# A message between hosts passes two network adapters and a switch.
_DCN_HOP_SECONDS = 1e-5


class BandwidthModel(StrEnum):
    """Which links a collective may use; see the module."""

    AXIS = "axis"
    PAPER = "paper"


@dataclass(frozen=True)
class _Level:
    """One level of a hierarchical collective.

    Attributes:
        ways: devices per group. bandwidth: bytes/s into one device. hop_seconds: what all hops of a collective take.
        exchange: bytes/s at which an all-to-all within the group empties a device's buffer. exchange_seconds: its latency.
        onward: bytes/s from every device to its next neighbour at once. onward_seconds: latency of that.
    """

    ways: int
    bandwidth: float
    hop_seconds: float
    exchange: float
    exchange_seconds: float
    onward: float
    onward_seconds: float


class Network:
    """Times of collectives over the mesh axes of one slice."""

    def __init__(
        self,
        slice_: Slice,
        model: BandwidthModel = BandwidthModel.AXIS,
        factor: float = 1.0,
        hop_seconds: float = 0.0,
        rates: Rates | None = None,
        fixed_seconds: float = 0.0,
        switch_rings: bool = False,
    ) -> None:
        """
        Args:
            factor: calibrated ratio of measured to modelled time of the bytes.
            hop_seconds: calibrated time per step of a ring, or through a switch, added to that of the bytes; 0 takes the chip's as a lower
                bound instead. Hops between hosts keep their own.
            rates: measured ones, instead of all the others.
            fixed_seconds: calibrated time of a collective in addition to its hops and bytes.
            switch_rings: devices behind a switch wait for each other one by one, not for all at once.
        """
        self.chip: Chip = slice_.chip
        self.model = model
        self.factor = factor
        self._hop_seconds = hop_seconds or slice_.chip.hop_seconds
        self._hops_add = hop_seconds > 0
        self._fixed_seconds = fixed_seconds
        self._switch_rings = switch_rings
        self._axes = {axis.name: axis for axis in slice_.axes}
        self._rates = rates
        self._known: dict[tuple[Op, tuple[str, ...]], tuple[float, float]] = {}  # measured seconds and factor
        self._levels: dict[tuple[str, ...], tuple[_Level, ...]] = {}

    def seconds(self, op: Op, axes: tuple[str, ...], num_bytes: float) -> float:
        """Time of one collective; `num_bytes` is the output of an all-gather and the input of the others."""
        levels = self._levels.get(axes)
        if levels is None:
            levels = self._levels[axes] = self._make_levels(axes)
        if self._rates is not None:
            known = self._known.get((op, axes))
            if known is None:
                known = self._known[op, axes] = self._rates.collective(op.value, math.prod(level.ways for level in levels))
            return known[0] + known[1] * self._transfer(op, levels, num_bytes)
        if op is Op.PERMUTE:
            return self._fixed_seconds + max(self._with_hops(num_bytes / level.onward, level.onward_seconds) for level in levels)
        spent, payload = 0.0, num_bytes
        for level in levels:  # innermost first: it moves the whole payload, the next one 1/ways of it
            if op is Op.ALL_TO_ALL:
                spent += self._with_hops(num_bytes / level.exchange, level.exchange_seconds)
            else:
                spent += self._with_hops(payload * (level.ways - 1) / level.ways / level.bandwidth, level.hop_seconds)
                payload /= level.ways
        return self._fixed_seconds + (2 * spent if op is Op.ALL_REDUCE else spent)

    def _with_hops(self, transfer: float, hops: float) -> float:
        """Seconds of bytes that take `transfer` on their links, and of their hops."""
        return transfer * self.factor + hops if self._hops_add else max(transfer * self.factor, hops)

    def transfer_seconds(self, op: Op, axes: tuple[str, ...], num_bytes: float) -> float:
        """What the links alone take for the bytes: no hops, no calibration."""
        return self._transfer(op, self._make_levels(axes), num_bytes)

    @staticmethod
    def _transfer(op: Op, levels: tuple[_Level, ...], num_bytes: float) -> float:
        if op is Op.PERMUTE:
            return max(num_bytes / level.onward for level in levels)
        spent, payload = 0.0, num_bytes
        for level in levels:
            if op is Op.ALL_TO_ALL:
                spent += num_bytes / level.exchange
            else:
                spent += payload * (level.ways - 1) / level.ways / level.bandwidth
                payload /= level.ways
        return 2 * spent if op is Op.ALL_REDUCE else spent

    def _make_levels(self, names: tuple[str, ...]) -> tuple[_Level, ...]:
        """The levels of the network that these axes use, the fastest (innermost) first."""
        axes = [self._axes[name] for name in names if self._axes[name].size > 1]
        cores = [axis for axis in axes if axis.link is Link.CORE]
        torus = [axis for axis in axes if axis.link is Link.TORUS]
        switched = [axis for axis in axes if axis.link is Link.SWITCH]
        dcn = [axis for axis in axes if axis.link is Link.DCN]
        levels: list[_Level] = []
        if cores:
            levels.append(_direct(_ways(cores), self.chip.core_links * self.chip.link_bandwidth, self._hop_seconds))
        if torus:
            levels.append(self._torus_level(torus))
        if switched:
            levels += self._switch_levels(switched)
        if dcn:
            levels.append(_direct(_ways(dcn), self.chip.dcn_bandwidth, _DCN_HOP_SECONDS))
        return tuple(levels)

    def _torus_level(self, axes: list[MeshAxis]) -> _Level:
        share = self.chip.devices_per_chip  # the devices of a chip share its links
        if self.model is BandwidthModel.PAPER:
            bandwidth = 2 * self.chip.torus_dims * self.chip.link_bandwidth / share
            return _Level(_ways(axes), bandwidth, 0.0, bandwidth, 0.0, bandwidth, 0.0)
        lines = [line for torus in dict.fromkeys(axis.torus for axis in axes) for line in _lines([a for a in axes if a.torus == torus])]
        bandwidth, hops, slowest = 0.0, 0.0, 0.0
        for line in lines:
            # W of this line: both directions of a ring; a line's ends have one link only.
            each = self.chip.link_bandwidth * (2 if line.ring else 1) / line.stride / share
            bandwidth += each
            hops += line.stride * (line.size / 2 if line.ring else line.size - 1)
            # Ring: b·K/(4·W) (scaling book). Half of a line sends half its bytes to the other half over one link: b·K/(4·link).
            slowest = max(slowest, line.size / (4 * each))
        farthest = max(axis.stride for axis in axes)
        onward = self.chip.link_bandwidth / farthest / share
        hop = self._hop_seconds
        return _Level(_ways(axes), bandwidth, hop * hops, 1 / slowest, self.chip.hop_seconds * hops, onward, hop * farthest)

    def _switch_levels(self, axes: list[MeshAxis]) -> list[_Level]:
        """Devices of a node talk through its switch; groups that reach beyond a node do so through the network adapters."""
        inside = outside = 1
        for axis in axes:
            here = min(axis.size, max(1, self.chip.node_size // axis.stride))
            inside *= here
            outside *= ceil_div(axis.size, here)
        levels = []
        if inside > 1:
            hops = inside - 1 if self._switch_rings else 1
            levels.append(_direct(inside, self.chip.switch_bandwidth, hops * self._hop_seconds))
        if outside > 1:
            levels.append(_direct(outside, self.chip.dcn_bandwidth, _DCN_HOP_SECONDS))
        return levels


@dataclass(frozen=True)
class _Line:
    """Adjacent factors of one torus axis, taken together."""

    size: int
    stride: int
    ring: bool


def _lines(axes: list[MeshAxis]) -> list[_Line]:
    """Merge factors of one torus axis whose strides continue each other; what spans the whole axis may be a ring."""
    merged: list[_Line] = []
    for axis in sorted(axes, key=lambda a: a.stride):
        ring = axis.wraps and axis.stride * axis.size == axis.torus_size
        if merged and merged[-1].stride * merged[-1].size == axis.stride:
            last = merged.pop()
            merged.append(_Line(last.size * axis.size, last.stride, ring))
        else:
            merged.append(_Line(axis.size, axis.stride, ring))
    return merged


def _direct(ways: int, bandwidth: float, hop_seconds: float) -> _Level:
    """A level at which every device reaches every other at `bandwidth`."""
    return _Level(ways, bandwidth, hop_seconds, bandwidth * ways / max(ways - 1, 1), hop_seconds, bandwidth, hop_seconds)


def _ways(axes: list[MeshAxis]) -> int:
    return math.prod(axis.size for axis in axes)
