"""Seconds for FLOPs and bytes: a chip, its calibration, a bandwidth model, and what kind of program is priced.

`Program` says what is credited. The plain program runs every collective by itself, scatters axis by axis, and lets all prompt tokens of
a shard attend to each other under a mask: that is what a traced jaxpr is compared with. The tiled program is what the JAX column runs:
the same with attention tile by tile, in which a prompt sees itself alone, and on TPUs with a parallel block's gathers of weights behind its
products. The looped program is the one that the paper measured, as its released code and its appendix describe it; `Program.looped` lists
what sets it apart.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from partinf.cost.calibration import ROOFLINE, Calibration
from partinf.cost.collectives import BandwidthModel, Network
from partinf.cost.items import DISPATCH, Item
from partinf.cost.ledger import Entry, Kind, Op, Part
from partinf.cost.movement import Axes, Group, Moved, Split
from partinf.hardware.chips import Chip
from partinf.hardware.rates import Curve, TypeRates
from partinf.hardware.slices import Slice
from partinf.workload import DType


@dataclass(frozen=True)
class Program:
    """What the priced program does beyond the plainest one.

    Attributes:
        per_prompt_attention: prompt tokens attend within their own prompt only, instead of to all tokens of the shard under a mask.
        blocked_attention: scores are made block by block and never stored whole.
        looped: the paper's program (Pope et al., 2023, section 3.5, and its released code):
            * a collective goes around one ring, so over one axis, at a time;
            * beside the product with W_in (fused with W_Q in a parallel block), and beside that with W_out (W_O), one of them is unrolled
              into partial products and runs behind them (`partinf.cost.overlap`);
            * queries are reduce-scattered over E's axes in the loop of F, whatever attention does with them next;
            * gathers of weights run behind the compute of the layer before;
            * a norm's sums are taken when all but the looped axis have been gathered;
            * int8 weights have float32 scales, so what was scaled travels as float32: into W_out and W_O, and out of them;
            * the table of logits is split as W_in is, V over F's axes and E over E's.
    """

    name: str
    per_prompt_attention: bool
    blocked_attention: bool
    looped: bool


PLAIN = Program("plain", per_prompt_attention=False, blocked_attention=False, looped=False)
TILED = Program("tiled", per_prompt_attention=True, blocked_attention=True, looped=False)
LOOPED = Program("looped", per_prompt_attention=True, blocked_attention=True, looped=True)
PROGRAMS = {program.name: program for program in (PLAIN, TILED, LOOPED)}


def program_for(chip: Chip) -> Program:
    """The program that is priced unless somebody says otherwise, when a layout is chosen and when it is simulated: that of the chip's
    platform."""
    return PROGRAMS[chip.platform.default_program]


class Pricing:
    """Makes priced ledger entries for one slice."""

    def __init__(
        self,
        slice_: Slice,
        calibration: Calibration = ROOFLINE,
        bandwidth_model: BandwidthModel = BandwidthModel.AXIS,
        program: Program | None = None,
    ) -> None:
        """
        Args:
            program: None for that of the chip, `program_for`.
        """
        chip = slice_.chip
        self.slice = slice_
        self.calibration = calibration
        self.program = program or program_for(chip)
        self.network = Network(slice_, bandwidth_model, calibration.collective_factor, calibration.hop_seconds, calibration.rates)
        self._flop_rate = chip.peak_bf16 / chip.devices_per_chip * calibration.matmul_efficiency
        self._byte_rate = chip.hbm_bandwidth / chip.devices_per_chip * calibration.hbm_share
        # A search asks for few of these many times.
        self.known_moves: dict[tuple[int, Split, Split], tuple[Moved, ...]] = {}
        self.known_groups: dict[tuple[object, Axes], Group] = {}
        self._measured: _Measured | None = None
        self._of_types: dict[tuple[DType, DType], Pricing] = {}

    def of_types(self, weights: DType, activations: DType) -> Pricing:
        """The same for steps with these types; only measured rates depend on them."""
        rates = self.calibration.rates
        if rates is None:
            return self
        found = self._of_types.get((weights, activations))
        if found is None:
            found = self._of_types[weights, activations] = copy.copy(self)
            found._measured = _Measured(rates.product(weights.value), rates.memory, rates.type(activations.value))
        return found

    def compute_seconds(self, flops: float, num_bytes: float) -> float:
        """Time of an op: the longer of its compute and memory time, or their sum where memory was measured not to hide."""
        compute, memory = flops / self._flop_rate, num_bytes / self._byte_rate
        return max(compute, memory) if self.calibration.hides_memory else compute + memory

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
        kind: Kind = Kind.MATMUL,
        shape: tuple[int, ...] = (),
        prompt: bool = False,
    ) -> Entry:
        """A dot product of `flops`, of which the share `useful` is not padding.

        Args:
            shape: as in `Entry`. prompt: the core is that of prompts.
        """
        if self._measured is None:
            seconds = self.compute_seconds(flops, weight_bytes + kv_bytes + activation_bytes)
        elif kind is Kind.ATTENTION:
            seconds = self._measured.core(flops, kv_bytes, prompt)
        else:
            seconds = self._measured.product(flops, weight_bytes, activation_bytes, shape[0])
        return Entry(
            item,
            part,
            kind,
            count,
            flops * useful,
            flops * (1 - useful),
            weight_bytes,
            kv_bytes,
            activation_bytes,
            seconds=seconds,
            shape=shape,
        )

    def traffic(self, item: Item, part: Part, count: int, num_bytes: float) -> Entry:
        """Activations that pass through HBM without a product."""
        if self._measured is None:
            seconds = self.compute_seconds(0.0, num_bytes)
        else:
            rates = self._measured.rates
            seconds = num_bytes / (rates.choice if part is Part.SAMPLING else rates.activations)
        return Entry(item, part, Kind.MEMORY, count, activation_bytes=num_bytes, seconds=seconds)

    def dispatch(self) -> list[Entry]:
        """What a step takes beside all its work, where that was measured."""
        if self._measured is None:
            return []
        return [Entry(DISPATCH, Part.EMBEDDING, Kind.MEMORY, seconds=self._measured.rates.step_seconds)]

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
        return Entry(
            item, part, Kind.COLLECTIVE, count, op=op, axes=axes, bytes=num_bytes, dtype=dtype, padding_bytes=padding, seconds=seconds
        )


@dataclass(frozen=True)
class _Measured:
    """Measured rates for one pair of types: nothing hides behind anything else but the reading of weights behind their product."""

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

    def core(self, flops: float, kv_bytes: float, prompt: bool) -> float:
        if prompt:
            return self.rates.op_seconds + flops / self.rates.prompt_flops
        return self.rates.op_seconds + kv_bytes / self.rates.decode_kv + flops / self.rates.decode_flops
