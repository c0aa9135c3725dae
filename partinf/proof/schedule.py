"""What a compiled program does and how long each piece takes: collectives with their axes, sources and hidden parts, and all other work.

The text is in schedule order; the time of each piece comes from a walk over it (`partinf.proof.walk`).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from partinf.cost.collectives import Network
from partinf.cost.ledger import Op
from partinf.hardware.slices import DCN_AXIS, Slice
from partinf.proof.hlo import DTYPE_NAMES, Computation, Frame, Instruction, Module, Shape, groups
from partinf.proof.pace import Pace, pace_of
from partinf.proof.report import Collective, Work
from partinf.proof.traffic import collective_of, collective_op, is_kernel
from partinf.proof.walk import KernelRun, Walk

# Modules that move or multiply for others, as paths in the compiled text: the line that called them says more.
CARRIERS = tuple(
    f"partinf/{name}.py" for name in ("partition/collectives", "partition/collective_matmul", "partition/quantize", "transformer/linear")
)

_FED_BY = 3  # how many instructions back the source of a nameless one is looked for
# jax's names of collectives → ours.
_ASKED = {"reduce_scatter": "reduce-scatter", "all_gather": "all-gather", "all_to_all": "all-to-all", "ppermute": "collective-permute"}
_ASKED |= {"ragged_all_to_all": "all-to-all", "psum": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce"}


@dataclass(frozen=True)
class Schedule:
    """A compiled program, read. `seconds` is the time of all `work` and of the exposed parts of all `collectives`.

    Attributes:
        work: what takes the time apart from collectives, waiting for transfers included; the most expensive first.
        kernels: those for which the compiler gives no cycles, by name.
        begun: by the same name, when those began that run in no loop.
    """

    seconds: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    work: tuple[Work, ...]
    kernels: Mapping[str, KernelTime]
    begun: Mapping[str, tuple[float, ...]]

    @property
    def compute_seconds(self) -> float:
        """The part that is not exposed time of collectives."""
        return sum(one.seconds * one.count for one in self.work)


class KernelTime(NamedTuple):
    """Of all runs of a kernel.

    Attributes:
        known: whether its time is known; otherwise it takes as long as moving all its operands takes.
    """

    seconds: float
    runs: int
    known: bool


class Reader:
    """Reads a module for one slice."""

    def __init__(
        self,
        module: Module,
        slice_: Slice,
        network: Network,
        taken: Callable[[Sequence[Frame]], float] = lambda _: 1.0,
        kernels: Mapping[str, Callable[[Instruction, float], KernelRun]] | None = None,
        pace: Pace | None = None,
    ) -> None:
        """
        Args:
            taken: how often of all times the branches of a conditional run, by the lines that it comes from.
            kernels: one run of a kernel without cycles, by the name that its instructions begin with; given the instruction and
                how many of that name run.
            pace: constants that correct the compiler's account; those of the chip by default.
        """
        self._module = module
        self._taken = lambda conditional: taken(module.source(conditional))
        self._sizes = slice_.axis_sizes
        self._network = network
        self._kernels = kernels or {}
        self._pace = pace or pace_of(slice_)
        self._times: dict[str, float] = defaultdict(float)
        for block, times in module.blocks(self._taken):
            self._times[block.name] += times
        self._runs: dict[str, float] = defaultdict(float)
        for block, kernel in self._every(is_kernel):
            self._runs[kernel_name(kernel.name)] += self._times[block.name]

    def _every(self, wanted: Callable[[Instruction], bool]) -> Iterator[tuple[Computation, Instruction]]:
        for name in self._times:
            block = self._module.computations[name]
            yield from ((block, instruction) for instruction in block.instructions if wanted(instruction))

    def read(self) -> Schedule:
        """The whole program."""
        walk = Walk(self._module, self._pace, self._priced, self._kernel_run, self._taken)
        collectives: list[Collective] = []
        work: list[Work] = []
        kernels: dict[str, KernelTime] = {}
        for block, instruction in self._every(lambda _: True):
            times, spent = self._times[block.name], walk.spent.get((block.name, instruction.name), 0.0)
            if collective_of(self._module, block, instruction):
                collectives += self._collectives(block, instruction, times, spent)
            elif spent or instruction.cycles:
                work.append(self._work(block, instruction, times, spent))
            if is_kernel(instruction):
                name = kernel_name(instruction.name)
                before = kernels.get(name, KernelTime(0.0, 0, name in self._kernels))
                kernels[name] = before._replace(seconds=before.seconds + spent, runs=before.runs + round(times))
        dearest = sorted(work, key=lambda one: -one.seconds * one.count)
        begun: dict[str, tuple[float, ...]] = defaultdict(tuple)
        for instruction_name, when in walk.begun:
            begun[kernel_name(instruction_name)] += (when,)
        return Schedule(walk.seconds, walk.moved, _summed(collectives), tuple(dearest), kernels, begun)

    def _kernel_run(self, kernel: Instruction) -> KernelRun | None:
        name = kernel_name(kernel.name)
        return self._kernels[name](kernel, self._runs[name]) if name in self._kernels else None

    def _priced(self, block: Computation, instruction: Instruction) -> tuple[tuple[str, ...], float]:
        """Axes and seconds of a collective."""
        op, axes, payloads, _ = self._described(block, instruction)
        return axes, self._seconds(op, axes, sum(shape.num_bytes for shape in payloads))

    def _described(self, block: Computation, instruction: Instruction) -> tuple[str, tuple[str, ...], list[Shape], Instruction]:
        home, inner = collective_of(self._module, block, instruction) or (block, instruction)
        op = collective_op(inner) or ""
        if op == "all-reduce" and home.name.startswith("all-reduce-scatter"):  # fused with the slice of its result
            op = "reduce-scatter"
        axes = (DCN_AXIS,) if inner.opcode == "send" else axes_of(groups(inner), self._sizes)
        return op, axes, _payloads(home, inner, op), inner

    def _collectives(self, block: Computation, instruction: Instruction, times: float, exposed: float) -> list[Collective]:
        op, axes, payloads, inner = self._described(block, instruction)
        source, requested = self._source(block, instruction), self._requested(inner)
        total = self._seconds(op, axes, sum(shape.num_bytes for shape in payloads))
        fraction = round(max(0.0, 1 - exposed / (total * times)), 9) if total and times else 0.0
        share = sum(shape.num_bytes for shape in payloads) or 1
        return [
            Collective(
                op, axes, DTYPE_NAMES.get(shape.dtype, shape.dtype), shape.num_bytes, round(times),
                total * shape.num_bytes / share, fraction, source, requested, len(payloads),
            )
            for shape in payloads
            if axes
        ]  # fmt: skip

    def _seconds(self, op: str, axes: tuple[str, ...], num_bytes: int) -> float:
        return self._network.seconds(Op(op), axes, num_bytes) if axes else 0.0

    def _requested(self, instruction: Instruction) -> str:
        """What our program requested: the end of the op's name, or that of its reduction where the compiler rewrote it."""
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

    def _work(self, block: Computation, instruction: Instruction, times: float, spent: float) -> Work:
        shape, count = instruction.shapes[0], max(round(times), 1)
        argument = self._module.argument(block, instruction)
        what = f"{instruction.opcode} of {argument + ' ' if argument else ''}{shape.dtype}{list(shape.dims)}"
        if is_kernel(instruction):
            what = f"kernel {kernel_name(instruction.name)}, {shape.dtype}{list(shape.dims)}"
        elif instruction.opcode.endswith("-done"):
            what = f"waiting in {what}"
        source, moves = self._source(block, instruction), self._only_moves(instruction)
        return Work(what, count, spent / count, shape.num_bytes, moves, source)


def _payloads(home: Computation, collective: Instruction, op: str) -> list[Shape]:
    """The output of an all-gather, the input of the others, array by array. Of an exchange that is ragged the smaller one of rows that are
    sent and places where they arrive, of which one holds what a device may send, and the other what all may send to it."""
    operands = [shape for name in collective.operands if name in home.by_name for shape in home.by_name[name].shapes]
    operands = [shape for shape in operands if shape.dtype != "token"]
    if collective.opcode.startswith("ragged"):
        return [min(operands[0], collective.shapes[-1], key=lambda shape: shape.num_bytes)]
    if op != "all-gather":
        return operands
    if not collective.opcode.endswith("-start"):
        return list(collective.shapes)
    return list(collective.shapes[len(operands) : 2 * len(operands)])  # (inputs, outputs, …)


def kernel_name(name: str) -> str:
    """The name of a kernel, without the number that tells its instructions apart."""
    return name.partition(".")[0]


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
    named = [frame for frame in ours if not frame.startswith(CARRIERS)]
    return (named or ours or [""])[0]


def _summed(collectives: list[Collective]) -> tuple[Collective, ...]:
    """Equal ones counted together, the dearest first."""
    found: dict[Collective, int] = {}
    for one in collectives:
        key = Collective(**{**one.__dict__, "count": 1})
        found[key] = found.get(key, 0) + one.count
    summed = [Collective(**{**key.__dict__, "count": count}) for key, count in found.items()]
    return tuple(sorted(summed, key=lambda c: -c.exposed_seconds))
