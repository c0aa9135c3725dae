"""What runs when: collectives of the compiled program with their axes and sources, what hides them, and the time of everything else.

The text is in schedule order. A collective is hidden only where its start and its done enclose work of the same block, and only by as
much time as that work takes; each piece of work hides one collective at most. Where the compiler carries a collective forward inside other
fusions, only those count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from partinf.cost.collectives import Network
from partinf.cost.ledger import Op
from partinf.hardware.chips import Chip
from partinf.hardware.slices import DCN_AXIS, Slice
from partinf.proof.hlo import DTYPE_NAMES, Computation, Frame, Instruction, Module, Shape, groups
from partinf.proof.report import Collective, Work
from partinf.proof.traffic import collective_of, collective_op, hbm_bytes, is_kernel, stage_of

# Modules that move or multiply for others, as paths in the compiled text: the line that called them says more.
CARRIERS = tuple(
    f"partinf/{name}.py" for name in ("partition/collectives", "partition/collective_matmul", "partition/quantize", "transformer/linear")
)

_RUN = ("while", "call", "conditional")  # what runs computations of its own
_FED_BY = 3  # how many instructions back the source of a nameless one is looked for
# jax's names of collectives → ours.
_ASKED = {"reduce_scatter": "reduce-scatter", "all_gather": "all-gather", "all_to_all": "all-to-all", "ppermute": "collective-permute"}
_ASKED |= {"psum": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce"}


@dataclass(frozen=True)
class Schedule:
    """A compiled program, read.

    Attributes:
        compute_seconds: per block the longer of cycles and bytes, times how often it runs. work: what takes it, the dearest first.
        unestimated: names of kernels for which the compiler gives no cycles.
    """

    compute_seconds: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    work: tuple[Work, ...]
    unestimated: tuple[str, ...]


class Reader:
    """Reads a module for one slice."""

    def __init__(self, module: Module, slice_: Slice, network: Network, taken: Callable[[Sequence[Frame]], float] = lambda _: 1.0) -> None:
        """
        Args:
            taken: how often of all times the branches of a conditional run, by the lines that it comes from.
        """
        self._module = module
        self._taken = lambda conditional: taken(module.source(conditional))
        self._sizes = slice_.axis_sizes
        self._network = network
        self._clock = slice_.chip.clock
        self._byte_rate = byte_rate(slice_.chip)

    def read(self) -> Schedule:
        """The whole program."""
        seconds = moved = 0.0
        collectives: list[Collective] = []
        work: list[Work] = []
        unestimated: list[str] = []
        for block, times in self._module.blocks(self._taken):
            spent, num_bytes = self._block(block)
            seconds += times * spent
            moved += times * num_bytes
            hidden = self._hidden(block)
            for instruction in block.instructions:
                if collective_of(self._module, block, instruction):
                    collectives += self._collectives(block, instruction, times, hidden.get(instruction.name, 0.0))
                elif instruction.cycles:
                    work.append(self._work(block, instruction, times))
                elif is_kernel(instruction):
                    unestimated.append(instruction.name.partition(".")[0])
        dearest = sorted(work, key=lambda one: -one.seconds * one.count)
        return Schedule(seconds, moved, _summed(collectives), tuple(dearest), tuple(unestimated))

    def _block(self, block: Computation) -> tuple[float, int]:
        """Seconds of one run of a block without its collectives, the longer of cycles and bytes; and the bytes."""
        cycles = sum(instruction.cycles for instruction in block.instructions)
        num_bytes = sum(hbm_bytes(self._module, block, instruction) for instruction in block.instructions)
        return max(cycles / self._clock if self._clock else 0.0, num_bytes / self._byte_rate), num_bytes

    def time(self, block: Computation, instruction: Instruction) -> float:
        """Seconds of one instruction that is no collective; of a loop, those of all that it runs and that hides nothing within it."""
        inside = list(self._module.within(instruction, self._taken))
        if inside:
            return sum(times * max(0.0, self._block(part)[0] - sum(self._hidden(part).values())) for part, times in inside)
        cycles = instruction.cycles / self._clock if self._clock else 0.0
        return max(cycles, hbm_bytes(self._module, block, instruction) / self._byte_rate)

    def _hidden(self, block: Computation) -> dict[str, float]:
        """Time of the work that each open collective encloses; of one that fusions carry forward, the time of those fusions."""
        open_: dict[str, float] = {}
        closed: dict[str, float] = {}
        carried: dict[str, str] = {}  # channel → the fusion that started its collective
        for instruction in block.instructions:
            stage = stage_of(self._module, instruction)
            if stage is not None and stage[0] == "start":
                carried[stage[1]] = instruction.name
                closed[instruction.name] = 0.0
            elif stage is not None and stage[0] == "step":
                closed[carried[stage[1]]] += self.time(block, instruction)
            elif instruction.opcode.endswith("-start") and collective_of(self._module, block, instruction):
                open_[instruction.name] = 0.0
            elif instruction.opcode.endswith("-done") and instruction.operands and instruction.operands[0] in open_:
                closed[instruction.operands[0]] = open_.pop(instruction.operands[0])
            elif open_ and (instruction.cycles or instruction.opcode in _RUN):
                first = next(iter(open_))  # work hides the collective that has been open longest
                open_[first] += self.time(block, instruction)
        return closed

    def _collectives(self, block: Computation, instruction: Instruction, times: float, hidden: float) -> list[Collective]:
        home, inner = collective_of(self._module, block, instruction) or (block, instruction)
        op = collective_op(inner) or ""
        if op == "all-reduce" and home.name.startswith("all-reduce-scatter"):  # fused with the slice of its result
            op = "reduce-scatter"
        axes = (DCN_AXIS,) if inner.opcode == "send" else axes_of(groups(inner), self._sizes)
        payloads = _payloads(home, inner, op)
        source = self._source(block, instruction)
        asked = self._asked(inner)
        total = self._seconds(op, axes, sum(shape.num_bytes for shape in payloads))
        fraction = min(1.0, hidden / total) if total else 0.0
        share = sum(shape.num_bytes for shape in payloads) or 1
        return [
            Collective(
                op, axes, DTYPE_NAMES.get(shape.dtype, shape.dtype), shape.num_bytes, round(times),
                total * shape.num_bytes / share, fraction, source, asked, len(payloads),
            )
            for shape in payloads
            if axes
        ]  # fmt: skip

    def _seconds(self, op: str, axes: tuple[str, ...], num_bytes: int) -> float:
        return self._network.seconds(Op(op), axes, num_bytes) if axes else 0.0

    def _asked(self, instruction: Instruction) -> str:
        """What our program asked for: the end of the op's name, or that of its reduction where the compiler rewrote it."""
        last = instruction.op_name.rpartition("/")[2].split(".")[0]
        reduction = self._module.computations.get(instruction.called("to_apply") or "")
        if last not in _ASKED and reduction and reduction.instructions:
            last = re.split(r"[.\d]", reduction.instructions[0].name)[0]
        return _ASKED.get(last, "")

    def _source(self, block: Computation, instruction: Instruction) -> str:
        """The line of ours; where the compiler made the instruction up, the most telling one of what feeds it."""
        frames = self._module.source(instruction)
        level = [instruction]
        for _ in range(0 if frames else _FED_BY):
            level = [block.by_name[name] for one in level for name in one.operands if name in block.by_name]
            frames = max([frames, *map(self._module.source, level)], key=len)
        return _of_ours(frames)

    def _only_moves(self, instruction: Instruction) -> bool:
        if instruction.opcode in ("copy", "transpose"):
            return True
        called = self._module.computations.get(instruction.called("calls") or "") if instruction.opcode == "fusion" else None
        moving = {"parameter", "constant", "dynamic-slice", "bitcast", "copy", "transpose", "slice", "reshape", "tuple"}
        return called is not None and all(inner.opcode in moving for inner in called.instructions)

    def _work(self, block: Computation, instruction: Instruction, times: float) -> Work:
        shape = instruction.shapes[0]
        argument = self._module.argument(block, instruction)
        what = f"{instruction.opcode} of {argument + ' ' if argument else ''}{shape.dtype}{list(shape.dims)}"
        source, moves = self._source(block, instruction), self._only_moves(instruction)
        return Work(what, max(round(times), 1), self.time(block, instruction), shape.num_bytes, moves, source)


def _payloads(home: Computation, collective: Instruction, op: str) -> list[Shape]:
    """The output of an all-gather, the input of the others, array by array."""
    operands = [shape for name in collective.operands if name in home.by_name for shape in home.by_name[name].shapes]
    operands = [shape for shape in operands if shape.dtype != "token"]
    if op != "all-gather":
        return operands
    if not collective.opcode.endswith("-start"):
        return list(collective.shapes)
    return list(collective.shapes[len(operands) : 2 * len(operands)])  # (inputs, outputs, …)


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
    told = [frame for frame in ours if not frame.startswith(CARRIERS)]
    return (told or ours or [""])[0]


def _summed(collectives: list[Collective]) -> tuple[Collective, ...]:
    """Equal ones counted together, the dearest first."""
    found: dict[Collective, int] = {}
    for one in collectives:
        key = Collective(**{**one.__dict__, "count": 1})
        found[key] = found.get(key, 0) + one.count
    summed = [Collective(**{**key.__dict__, "count": count}) for key, count in found.items()]
    return tuple(sorted(summed, key=lambda c: -c.exposed_seconds))
