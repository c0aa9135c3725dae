"""How long a compiled program takes: a walk over its schedule with one core, one queue of transfers from and to HBM, and the links.

    core    instructions one after the other, in the order of the schedule
    queue   transfers that were started (`copy-start`, `slice-start`) one after the other, asynchronously; what ends one waits for it
    links   a collective occupies those of its axes; asynchronous ones overlap the core, the others stall it

An instruction whose operands or results lie in HBM moves its own bytes while it runs: they come first, and the queue waits for them. The
bytes of a kernel, whose transfers are like those of the queue, share the bandwidth with it: they take twice as long as alone, or as long
as the whole queue and they where that is less. So no byte is had for nothing. A loop takes the time of its body in steady state, once for
every trip; a branch counts by how often it is taken. Every second by which the core moves on belongs to one instruction: to what ran, to
the transfer or to the collective that was waited for. So they sum to the whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from partinf.proof.hlo import Computation, Instruction, Module
from partinf.proof.pace import Pace
from partinf.proof.traffic import collective_of, hbm_bytes, is_kernel, kernel_bytes, only_moves, product_of, stage_of

Key = tuple[str, str]  # computation, instruction
Collective = Callable[[Computation, Instruction], tuple[tuple[str, ...], float]]


class KernelRun(NamedTuple):
    """One run of a kernel.

    Attributes:
        num_bytes: what it moves from and to HBM in that time; None for as much as it is handed, or can.
    """

    seconds: float
    num_bytes: float | None = None


@dataclass
class Flight:
    """A collective under way: when its links begin and end with it, and what it waited for before it could begin."""

    key: Key
    begin: float
    end: float
    before: Flight | None = None


@dataclass
class Carried:
    """A collective that fusions carry forward: what is left of it."""

    key: Key
    left: float


@dataclass
class Transfer:
    """Bytes between HBM and the chip, in the queue."""

    end: float


@dataclass
class _Clock:
    """When the core is free, what transfers are under way, in order, and who has the links last."""

    core: float = 0.0
    queue: list[Transfer] = field(default_factory=list)
    links: dict[str, Flight] = field(default_factory=dict)

    def copy(self) -> _Clock:
        return _Clock(self.core, [Transfer(one.end) for one in self.queue], dict(self.links))

    def start(self, seconds: float) -> Transfer:
        """A transfer joins the queue."""
        self.queue = [one for one in self.queue if one.end > self.core]
        self.queue.append(Transfer((self.queue[-1].end if self.queue else self.core) + seconds))
        return self.queue[-1]

    def overtake(self, seconds: float) -> None:
        """Bytes that do not join the queue and come first."""
        for one in self.queue:
            one.end += seconds if one.end > self.core else 0.0

    def share(self, seconds: float) -> float:
        """Bytes that do not join the queue: how long they take in parallel with it."""
        lead = max(0.0, self.queue[-1].end - self.core) if self.queue else 0.0
        others = min(lead, seconds)  # what the queue gets done meanwhile
        for one in self.queue:
            one.end += seconds if one.end > self.core + others else 0.0
        return seconds + others


class Walk:
    """One walk over a module.

    Attributes:
        spent: seconds of the core by instruction, over all its runs; of collectives the exposed part. `seconds` is their sum.
        moved: bytes from and to HBM, kernels left out.
        begun: when every kernel of the entry computation began, in order.
    """

    def __init__(
        self,
        module: Module,
        pace: Pace,
        collective: Collective,
        kernel: Callable[[Instruction], KernelRun | None],
        taken: Callable[[Instruction], float],
    ) -> None:
        """
        Args:
            collective: the axes and the seconds of a collective. kernel: one run of a kernel, None if unknown.
            taken: how often of all times the branches of a conditional run.
        """
        self.spent: dict[Key, float] = defaultdict(float)
        self.moved = 0.0
        self.begun: list[tuple[str, float]] = []
        self._module, self._pace, self._collective, self._kernel, self._taken = module, pace, collective, kernel, taken
        clock = _Clock()
        self._run(module.entry, clock, 1.0)
        self.seconds = clock.core

    def _run(self, name: str, clock: _Clock, weight: float) -> None:
        """Walk one computation. Seconds count `weight` times; the clock moves on by one run."""
        block = self._module.computations.get(name)
        started: dict[str, Transfer] = {}
        flights: dict[str, Flight] = {}
        carried: dict[str, Carried] = {}
        for instruction in block.instructions if block is not None else ():
            assert block is not None
            key, op = (block.name, instruction.name), instruction.opcode
            if op in ("while", "call", "conditional"):
                self._within(instruction, clock, weight)
            elif stage_of(self._module, instruction):
                self._staged(block, instruction, carried, clock, weight)
            elif collective_of(self._module, block, instruction):
                flight = self._fly(block, instruction, clock)
                if op.endswith("-start"):
                    flights[instruction.name] = flight
                else:
                    self._land(flight, clock, weight)
            elif op.endswith("-done"):
                begun = instruction.operands[0] if instruction.operands else ""
                if begun in flights:
                    self._land(flights.pop(begun), clock, weight)
                elif begun in started:
                    self._spend(key, max(0.0, started.pop(begun).end - clock.core), clock, weight)
            elif op.endswith("-start"):
                started[instruction.name] = clock.start(self._transfer(block, instruction, weight))
            else:
                self._execute(block, instruction, clock, weight)

    def _within(self, instruction: Instruction, clock: _Clock, weight: float) -> None:
        if instruction.opcode == "while":
            self._loop(instruction.called("body") or "", self._module.trip_count(instruction), clock, weight)
        elif instruction.opcode == "call":
            self._run(instruction.called("to_apply") or "", clock, weight)
        else:
            share, before = self._taken(instruction), clock.core
            for branch in self._module.branches(instruction):
                own = clock.copy()
                own.core = before
                self._run(branch, own, weight * share)
                clock.core += share * (own.core - before)

    def _loop(self, body: str, trips: int, clock: _Clock, weight: float) -> None:
        inside = clock.copy()
        if trips > 1:
            self._run(body, inside, 0.0)  # until the queue is as full as every later trip finds it
        begun = inside.core
        self._run(body, inside, weight * trips)
        clock.core += trips * (inside.core - begun)

    def _fly(self, block: Computation, instruction: Instruction, clock: _Clock) -> Flight:
        axes, seconds = self._collective(block, instruction)
        before = max((clock.links[axis] for axis in axes if axis in clock.links), key=lambda flight: flight.end, default=None)
        begin = max(clock.core, before.end if before else 0.0)
        waited = before if before and before.end > clock.core else None
        flight = Flight((block.name, instruction.name), begin, begin + seconds, waited)
        clock.links |= dict.fromkeys(axes, flight)
        return flight

    def _land(self, flight: Flight, clock: _Clock, weight: float) -> None:
        """Wait for the end of a collective, and of those that held its links before it, each for its own part."""
        start, end = clock.core, flight.end
        clock.core = max(start, end)
        one: Flight | None = flight
        while one is not None and end > start:
            begin = max(start, one.begin)
            self.spent[one.key] += max(0.0, end - begin) * weight
            end, one = min(end, begin), one.before

    def _staged(self, block: Computation, instruction: Instruction, carried: dict[str, Carried], clock: _Clock, weight: float) -> None:
        """A part of a collective that is carried forward inside fusions: only these hide it."""
        what, channel = stage_of(self._module, instruction) or ("", "")
        if what == "start":
            carried[channel] = Carried((block.name, instruction.name), self._collective(block, instruction)[1])
        elif what == "step":
            before = clock.core
            self._execute(block, instruction, clock, weight)
            if channel in carried:
                carried[channel].left -= clock.core - before
        elif channel in carried:
            one = carried.pop(channel)
            self._spend(one.key, max(0.0, one.left), clock, weight)

    def _execute(self, block: Computation, instruction: Instruction, clock: _Clock, weight: float) -> None:
        if is_kernel(instruction):
            known, whole = self._kernel(instruction), kernel_bytes(block, instruction) / self._pace.byte_rate
            seconds = whole if known is None else known.seconds
            moving = whole if known is None or known.num_bytes is None else known.num_bytes / self._pace.byte_rate
            moving = clock.share(min(moving, seconds))
            if block is self._module.computations[self._module.entry]:
                self.begun.append((instruction.name, clock.core))
        else:
            moving = self._transfer(block, instruction, weight)
            seconds = self._cycles(block, instruction, moving)
            clock.overtake(moving)
        self._spend((block.name, instruction.name), max(seconds, moving), clock, weight)

    def _transfer(self, block: Computation, instruction: Instruction, weight: float) -> float:
        """Seconds of the bytes that an instruction moves from and to HBM, which count as moved."""
        num_bytes = hbm_bytes(self._module, block, instruction)
        self.moved += num_bytes * weight
        return num_bytes / self._pace.byte_rate

    def _cycles(self, block: Computation, instruction: Instruction, moving: float) -> float:
        """Seconds of what the core does for one instruction, whose own bytes take `moving`."""
        if not instruction.cycles:
            return 0.0
        product = product_of(self._module, block, instruction)
        if product is not None:
            return self._pace.product(instruction.cycles, *product, moving)
        moves = only_moves(self._module, instruction)
        return self._pace.moving(instruction.cycles) if moves else self._pace.other(instruction.cycles)

    def _spend(self, key: Key, seconds: float, clock: _Clock, weight: float) -> None:
        clock.core += seconds
        self.spent[key] += seconds * weight
