"""Seconds for FLOPs and bytes: a chip, its calibration, a bandwidth model, and what kind of program is priced (`partinf.cost.program`)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from partinf.cost.calibration import ROOFLINE, Calibration
from partinf.cost.collectives import BandwidthModel, Network
from partinf.cost.items import DISPATCH, Item
from partinf.cost.ledger import Entry, EntryKind, Op, Part
from partinf.cost.movement import Axes, Group, Moved, Split
from partinf.cost.program import Program, program_for
from partinf.hardware.rates import Curve, TypeRates
from partinf.hardware.slices import Slice
from partinf.workload import DType

_LATENCY = 1e-6  # of a transfer from or to HBM, assumed


class Pricing:
    """Makes priced ledger entries for one slice."""

    def __init__(
        self,
        slice_: Slice,
        calibration: Calibration = ROOFLINE,
        bandwidth_model: BandwidthModel = BandwidthModel.AXIS,
        program: Program | None = None,
        skew: float = 0.0,
    ) -> None:
        """
        Args:
            program: None for that of the chip, `program_for`. skew: of routers, see `partinf.cost.routing`; 0 for uniform routing.
        """
        chip = slice_.chip
        self.slice = slice_
        self.calibration, self.skew = calibration, skew
        self.program = program or program_for(chip)
        hop = calibration.hop(self.program.looped)
        fixed, rings = calibration.collective_seconds, calibration.switch_rings
        self.network = Network(slice_, bandwidth_model, calibration.collective_factor, hop, calibration.rates, fixed, rings)
        self._peak = chip.peak_bf16 / chip.devices_per_chip
        self._flop_rate = self._peak * calibration.matmul_efficiency
        self._byte_rate = chip.hbm_bandwidth / chip.devices_per_chip * calibration.hbm_share
        # A search asks for few of these many times.
        self.known_moves: dict[tuple[int, Split, Split], tuple[Moved, ...]] = {}
        self.known_groups: dict[tuple[object, Axes], Group] = {}
        self.known_roles: dict[tuple[object, ...], Any] = {}
        self._streamed = calibration.streamed(DType.BF16)
        self._measured: _Measured | None = None
        self._of_types: dict[tuple[DType, DType], Pricing] = {}
        self._compiled: dict[bool, Pricing] = {}

    def compiled(self, unrolled: bool) -> Pricing:
        """The same for the program with its layers compiled one by one or in a loop, where that is the plan's to say. Where a platform
        reads no weights ahead, both have one price."""
        if not (self.program.either_layers and self.slice.chip.platform.fetches_ahead):
            return self
        found = self._compiled.get(unrolled)
        if found is None:
            found = self._compiled[unrolled] = copy.copy(self)
            found.program, found._of_types = replace(self.program, unrolled=unrolled, either_layers=False), {}
        return found

    def of_types(self, weights: DType, activations: DType) -> Pricing:
        """The same for steps with these types, on which measured rates depend, and how fast a product reads its weights itself."""
        rates, streamed = self.calibration.rates, self.calibration.streamed(weights)
        if rates is None and streamed == self._streamed:
            return self
        found = self._of_types.get((weights, activations))
        if found is None:
            found = self._of_types[weights, activations] = copy.copy(self)
            found._streamed, found._compiled = streamed, {}
            if rates is not None:
                found._measured = _Measured(rates.product(weights.value), rates.memory, rates.type(activations.value))
        return found

    def compute_seconds(self, flops: float, num_bytes: float) -> float:
        """Time of an op: the longer of its compute and memory time, or their sum where memory was measured not to hide."""
        compute, memory = flops / self._flop_rate, num_bytes / self._byte_rate
        return max(compute, memory) if self._hides_memory else compute + memory

    def least_seconds(self, flops: float, num_bytes: float) -> float:
        """What products of so many FLOPs, with weights of so many bytes, take at least, however they are shaped."""
        if self._measured is not None or self.calibration.rates is not None:
            return 0.0  # rates that depend on types and shapes
        return self.compute_seconds(flops, num_bytes)

    @property
    def _hides_memory(self) -> bool:
        """Whether memory traffic runs behind compute. Where it does not in a loop over layers, it does where they are compiled one by
        one."""
        return self.calibration.hides_memory or self.program.unrolled

    def _queued(self, entry: Entry, core: float, memory: float, fetched: bool) -> Entry:
        """The entry with its time, from what it takes of the core and of HBM. In an unrolled program the longer one leaves room for the
        other of a neighbour."""
        if not self._hides_memory:
            return entry._replace(seconds=core + memory)
        if not self.program.unrolled:
            return entry._replace(seconds=max(core, memory))
        # Keys and values are read by the kernel that wants them.
        early = max(memory - core, 0.0) if entry.weight_bytes and fetched else 0.0
        return entry._replace(seconds=max(core, memory), early=early, free=max(core - memory, 0.0))

    def product(
        self,
        item: Item,
        part: Part,
        count: int,
        flops: float,
        useful: float,
        weight_bytes: float = 0.0,
        kv_bytes: float = 0.0,
        activation_bytes: float = 0.0,
        kind: EntryKind = EntryKind.MATMUL,
        shape: tuple[int, ...] = (),
        prompt: bool = False,
        core_seconds: float = 0.0,
        done: float = 1.0,
        width: int = 0,
    ) -> Entry:
        """A dot product of `flops`, of which the share `useful` is not padding.

        Args:
            shape: as in `Entry`. prompt: the core is that of prompts. core_seconds: what a kernel or a loop takes on the core besides its
                products. done: times that the products are made, below 1 where some of them are skipped. width: of a head that it makes;
                one that is narrower than the matrix unit leaves the rest of it idle.
        """
        entry = Entry(item, part, kind, count, flops * useful, flops * (1 - useful), weight_bytes, kv_bytes, activation_bytes, shape=shape)
        if self._measured is not None:
            if kind is EntryKind.ATTENTION:
                return entry._replace(seconds=self._measured.core(flops, kv_bytes, prompt))
            seconds = self._measured.product(flops, weight_bytes, activation_bytes, shape[0])
            if not self.program.unrolled:
                return entry._replace(seconds=seconds)
            early = self._measured.early(flops, weight_bytes) if weight_bytes <= self.program.fetched_matrix else 0.0
            return entry._replace(seconds=seconds, early=early, free=self._measured.rates.op_seconds)
        core = flops * done / self._flop_rate + core_seconds
        if weight_bytes and shape:
            idle = self.slice.chip.matrix_side / width if width and self.program.head_by_head else 1.0
            core *= max(idle, self.calibration.slowed(shape[0]))
        memory = (weight_bytes + kv_bytes + activation_bytes) / self._byte_rate
        fetched = self.program.unrolled and weight_bytes <= self.program.fetched_matrix
        if self._streamed and not fetched:
            memory += weight_bytes / self._byte_rate * (self.calibration.hbm_share / self._streamed - 1)
        return self._queued(entry, core, memory, fetched)

    def traffic(self, item: Item, part: Part, count: int, num_bytes: float) -> Entry:
        """Activations that pass through HBM without a product."""
        if self._measured is None:
            seconds = self.compute_seconds(0.0, num_bytes)
        else:
            rates = self._measured.rates
            seconds = num_bytes / (rates.choice if part is Part.SAMPLING else rates.activations)
        return Entry(item, part, EntryKind.MEMORY, count, activation_bytes=num_bytes, seconds=seconds)

    @property
    def fetch_seconds(self) -> float:
        """How long HBM is read for what the program can hold ahead of its use."""
        return self.program.fetched_bytes / (self._byte_rate if self._measured is None else self._measured.memory)

    def kernel(self, rows: int) -> float:
        """What decode's kernel takes on the core for so many rows, in addition to its products."""
        return self.calibration.kernel_seconds + rows * self.calibration.row_seconds if self.program.decode_kernel else 0.0

    def tile_writes(self, item: Item, part: Part, count: int, num_bytes: float) -> list[Entry]:
        """What the kernel that writes tokens takes in each of so many layers for tiles of so many bytes, of which no chip's time is known:
        a transfer's latency twice, since tiles come before they go back, and their bytes each way at half of the rate of a long one."""
        if not (self.program.tile_writes and self.slice.chip.platform.tiles.paged):
            return []
        moved = 2 * num_bytes / (self._byte_rate if self._measured is None else self._measured.memory)
        seconds = 2 * _LATENCY + 2 * moved
        free = seconds - moved if self.program.unrolled else 0.0
        return [Entry(item, part, EntryKind.MEMORY, count, activation_bytes=2 * num_bytes, seconds=seconds, free=free)]

    def prompt_kernel(self, flops: float) -> float:
        """What the kernel for prompts takes on the core for the products that it makes."""
        return flops / (self._peak * self.calibration.prompt_share)

    def tile_loop(self, scores: float, pairs: float, tiles: float) -> float:
        """What a loop over so many tiles of prompts, pairs of tiles and scores takes on the core, in addition to its products."""
        one = self.calibration
        return scores * one.score_seconds + pairs * one.tile_seconds + tiles * one.query_tile_seconds

    def small(self, item: Item, part: Part, count: int, times: float | None = None, elements: float = 0.0) -> list[Entry]:
        """The small operations of each of so many layers, where their time is known.

        Args:
            times: as many dozens of them; those of attention and a feed-forward in the program unless given. elements: that they pass over.
        """
        seconds = self.calibration.layer_seconds * (self.program.small_operations if times is None else times)
        seconds += self.calibration.element_seconds * elements * self.program.passes_elements
        free = seconds if self.program.unrolled else 0.0
        return [Entry(item, part, EntryKind.MEMORY, count, seconds=seconds, free=free)] if seconds else []

    def dispatch(self) -> list[Entry]:
        """What a step takes in addition to all its work, where that was measured."""
        if self._measured is None:
            return []
        return [Entry(DISPATCH, Part.EMBEDDING, EntryKind.MEMORY, seconds=self._measured.rates.step_seconds)]

    def collective(
        self,
        item: Item,
        part: Part,
        count: int,
        op: Op,
        axes: tuple[str, ...],
        num_bytes: int,
        dtype: str,
        useful: float = 1.0,
        rides: bool = False,
    ) -> Entry:
        """One collective; `num_bytes` is the output of an all-gather, the input of the others.

        Args:
            rides: it travels in the messages of another, whose steps are paid for there.
        """
        seconds, padding = self.network.seconds(op, axes, num_bytes), num_bytes * (1 - useful)
        if rides:
            seconds -= self.network.seconds(op, axes, 0)
        free = seconds if self.program.unrolled else 0.0
        return Entry(
            item,
            part,
            EntryKind.COLLECTIVE,
            count,
            op=op,
            axes=axes,
            bytes=num_bytes,
            dtype=dtype,
            padding_bytes=padding,
            seconds=seconds,
            free=free,
        )


@dataclass(frozen=True)
class _Measured:
    """Measured rates for one pair of types: the reading of weights hides behind their product and, where layers are compiled one by one and
    the compiler reads weights ahead, behind what leaves memory alone."""

    curve: Curve
    memory: float
    rates: TypeRates
    _by_rows: dict[int, float] = field(default_factory=dict)

    def product(self, flops: float, weight_bytes: float, activation_bytes: float, rows: int) -> float:
        rate = self._by_rows.get(rows)
        if rate is None:
            rate = self._by_rows[rows] = self.curve(max(rows, 1))
        work = max(flops / rate, weight_bytes / self.memory)
        return self.rates.op_seconds + work + activation_bytes / self.rates.activations

    def early(self, flops: float, weight_bytes: float) -> float:
        """What a product waits for its weights alone: what their reading takes beyond its work at the rate of many rows."""
        return max(weight_bytes / self.memory - flops / self.curve.rates[-1], 0.0)

    def core(self, flops: float, kv_bytes: float, prompt: bool) -> float:
        if prompt:
            return self.rates.op_seconds + flops / self.rates.prompt_flops
        return self.rates.op_seconds + kv_bytes / self.rates.decode_kv + flops / self.rates.decode_flops
