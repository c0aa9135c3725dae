"""What runs when: collectives of the compiled program with their axes and sources, what hides them, and the time of everything else.

The text is in schedule order. A collective is hidden only where its start and its done enclose work of the same block, and only by as
much time as that work takes; each piece of work hides one collective at most.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from partinf.cost.collectives import Network
from partinf.cost.ledger import Op
from partinf.hardware import Chip, Slice
from partinf.proof.hlo import DTYPE_NAMES, Computation, Instruction, Module, Shape, groups
from partinf.proof.report import Collective
from partinf.proof.traffic import collective_op, hbm_bytes

# Cycles in the compiled text are of this clock (Hz).
CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
# Source files that move or multiply for others: the line that asked for it says more.
_CARRIERS = ("partinf/collectives.py", "partinf/transformer/linear.py", "partinf/quantize.py")


@dataclass(frozen=True)
class Copy:
    """Instructions that only move data within the device. seconds: of one."""

    count: int
    seconds: float
    num_bytes: int
    what: str
    source_op: str


@dataclass(frozen=True)
class Schedule:
    """A compiled program, read.

    Attributes:
        compute_seconds: per block the longer of cycles and bytes, times how often it runs.
        unestimated: kernels for which the compiler gives no cycles.
    """

    compute_seconds: float
    hbm_bytes: int
    collectives: tuple[Collective, ...]
    copies: tuple[Copy, ...]
    unestimated: tuple[str, ...]


class Reader:
    """Reads a module for one slice."""

    def __init__(self, module: Module, slice_: Slice, network: Network) -> None:
        self._module = module
        self._sizes = slice_.axis_sizes
        self._network = network
        self._clock = CLOCKS.get(slice_.chip.name)
        self._byte_rate = byte_rate(slice_.chip)

    def read(self) -> Schedule:
        """The whole program."""
        seconds, moved = 0.0, 0
        collectives: list[Collective] = []
        copies: list[Copy] = []
        unestimated: list[str] = []
        for block, times in self._module.blocks():
            cycles = sum(instruction.cycles for instruction in block.instructions)
            num_bytes = sum(hbm_bytes(self._module, block, instruction) for instruction in block.instructions)
            seconds += times * max(cycles / self._clock if self._clock else 0.0, num_bytes / self._byte_rate)
            moved += times * num_bytes
            hidden = self._hidden(block)
            for instruction in block.instructions:
                if collective_op(instruction):
                    collectives += self._collectives(block, instruction, times, hidden.get(instruction.name, 0.0))
                elif self._only_moves(instruction):
                    copies.append(self._copy(block, instruction, times))
                elif (
                    instruction.opcode == "custom-call"
                    and not instruction.cycles
                    and 'custom_call_target="tpu_custom_call"' in instruction.rest
                ):
                    unestimated.append(instruction.name)
        return Schedule(seconds, moved, _summed(collectives), tuple(copies), tuple(unestimated))

    def time(self, block: Computation, instruction: Instruction) -> float:
        """Seconds of one instruction that is no collective."""
        cycles = instruction.cycles / self._clock if self._clock else 0.0
        return max(cycles, hbm_bytes(self._module, block, instruction) / self._byte_rate)

    def _hidden(self, block: Computation) -> dict[str, float]:
        """Time of the work that each open collective encloses."""
        open_: dict[str, float] = {}
        closed: dict[str, float] = {}
        for instruction in block.instructions:
            if instruction.opcode.endswith("-start") and collective_op(instruction):
                open_[instruction.name] = 0.0
            elif instruction.opcode.endswith("-done") and instruction.operands and instruction.operands[0] in open_:
                closed[instruction.operands[0]] = open_.pop(instruction.operands[0])
            elif open_ and instruction.cycles:
                first = next(iter(open_))  # work hides the collective that has been open longest
                open_[first] += self.time(block, instruction)
        return closed

    def _collectives(self, block: Computation, instruction: Instruction, times: int, hidden: float) -> list[Collective]:
        op = collective_op(instruction) or ""
        axes = axes_of(groups(instruction), self._sizes)
        payloads = self._payloads(block, instruction, op)
        source = self._source(block, instruction)
        asked = self._asked(instruction)
        total = self._seconds(op, axes, sum(shape.num_bytes for shape in payloads))
        fraction = min(1.0, hidden / total) if total else 0.0
        share = sum(shape.num_bytes for shape in payloads) or 1
        return [
            Collective(
                op, axes, DTYPE_NAMES.get(shape.dtype, shape.dtype), shape.num_bytes, times, total * shape.num_bytes / share, fraction,
                source, asked, len(payloads),
            )
            for shape in payloads
            if axes
        ]  # fmt: skip

    def _payloads(self, block: Computation, instruction: Instruction, op: str) -> list[Shape]:
        """The output of an all-gather, the input of the others, array by array."""
        operands = [shape for name in instruction.operands if name in block.by_name for shape in block.by_name[name].shapes]
        if op != "all-gather":
            return operands
        if not instruction.opcode.endswith("-start"):
            return list(instruction.shapes)
        return list(instruction.shapes[len(operands) : 2 * len(operands)])  # (inputs, outputs, …)

    def _seconds(self, op: str, axes: tuple[str, ...], num_bytes: int) -> float:
        if op == "collective-permute":  # one neighbour, one link
            return self._network.seconds(Op.ALL_GATHER, axes, 2 * num_bytes) if axes else 0.0
        return self._network.seconds(Op(op), axes, num_bytes) if axes else 0.0

    def _asked(self, instruction: Instruction) -> str:
        """What our program asked for: the end of the op's name, or that of its reduction where the compiler rewrote it."""
        names = {
            "reduce_scatter": "reduce-scatter",
            "all_gather": "all-gather",
            "all_to_all": "all-to-all",
            "ppermute": "collective-permute",
        }
        names |= {"psum": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce"}
        last = instruction.op_name.rpartition("/")[2].split(".")[0]
        reduction = self._module.computations.get(instruction.called("to_apply") or "")
        if last not in names and reduction and reduction.instructions:
            last = re.split(r"[.\d]", reduction.instructions[0].name)[0]
        return names.get(last, "")

    def _source(self, block: Computation, instruction: Instruction) -> str:
        """The line of ours; of what feeds it where the compiler made it up."""
        frames = self._module.source(instruction)
        for name in instruction.operands:
            frames = frames or (self._module.source(block.by_name[name]) if name in block.by_name else ())
        return _of_ours(frames)

    def _only_moves(self, instruction: Instruction) -> bool:
        if not instruction.cycles:
            return False
        if instruction.opcode in ("copy", "transpose"):
            return True
        called = self._module.computations.get(instruction.called("calls") or "") if instruction.opcode == "fusion" else None
        moving = {"parameter", "constant", "dynamic-slice", "bitcast", "copy", "transpose", "slice", "reshape", "tuple"}
        return called is not None and all(inner.opcode in moving for inner in called.instructions)

    def _copy(self, block: Computation, instruction: Instruction, times: int) -> Copy:
        shape = instruction.shapes[0]
        what = f"{instruction.opcode} of {shape.dtype}{list(shape.dims)}"
        return Copy(times, self.time(block, instruction), shape.num_bytes, what, self._source(block, instruction))


def byte_rate(chip: Chip) -> float:
    """Bytes per second of HBM of one device."""
    return chip.hbm_bandwidth / chip.devices_per_chip


def axes_of(members: Sequence[tuple[int, ...]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ; devices are numbered row-major over the mesh."""
    found, stride = [], math.prod(sizes.values())
    for axis, size in sizes.items():
        stride //= size
        if any(len({device // stride % size for device in group}) > 1 for group in members):
            found.append(axis)
    return tuple(found)


def _of_ours(frames: Sequence[object]) -> str:
    ours = [str(frame) for frame in frames if str(frame).startswith("partinf/")]
    told = [frame for frame in ours if not frame.startswith(_CARRIERS)]
    return (told or ours or [""])[0]


def _summed(collectives: list[Collective]) -> tuple[Collective, ...]:
    """Equal ones counted together, the dearest first."""
    found: dict[Collective, int] = {}
    for one in collectives:
        key = Collective(**{**one.__dict__, "count": 1})
        found[key] = found.get(key, 0) + one.count
    summed = [Collective(**{**key.__dict__, "count": count}) for key, count in found.items()]
    return tuple(sorted(summed, key=lambda c: -c.exposed_seconds))
