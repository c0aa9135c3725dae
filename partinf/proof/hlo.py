"""The text of a compiled program as data: computations, instructions in schedule order, shapes, loops and source lines.

Only what a proof needs is read. The text is the compiler's own notation and nothing here knows of layouts or chips, so that small
captured texts can test it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath

from partinf.foundation.compiler_text import estimated_cycles
from partinf.foundation.rounding import round_up

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
DTYPE_NAMES = {"pred": "bool", "s8": "int8", "u8": "uint8", "bf16": "bfloat16", "f16": "float16"}
DTYPE_NAMES |= {"s32": "int32", "u32": "uint32", "f32": "float32"}
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


@dataclass(frozen=True)
class Shape:
    """One array: element type, dimensions, and what its layout says.

    Attributes:
        space: the memory that it lies in; 0 is HBM, the others are on the chip.
        stored: its elements and what fills its tiles up; 0 where nothing does.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    stored: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.dims) * _BYTES.get(self.dtype, 1)

    @property
    def stored_bytes(self) -> int:
        """Its bytes in tiles, which are moved whole: 16 elements in a row of 128 take eight times their size."""
        return max(self.num_bytes, self.stored * _BYTES.get(self.dtype, 1))

    @property
    def hbm_bytes(self) -> int:
        """Its bytes in tiles if it lies in HBM, otherwise 0."""
        return 0 if self.space else self.stored_bytes


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        shapes: the arrays of the result, one or the leaves of a tuple. operands: names. rest: all attributes, as text.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool = False

    @functools.cached_property
    def cycles(self) -> int:
        """Cycles that the compiler expects, 0 where it says nothing."""
        return estimated_cycles(self.rest)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute (`calls`, `body`, `condition`, `to_apply`) names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """Instructions in schedule order."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}


@dataclass(frozen=True)
class Frame:
    """A line of source."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


class Module:
    """A compiled program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        lines, name = list[str](), ""
        for line in text.split("\n"):
            header = _HEADER.match(line)
            if header and not line.startswith(" "):
                name, lines = header[2], []
                self.entry = name if header[1] else self.entry
            elif line.startswith("}") and name:
                self.computations[name] = Computation(name, tuple(i for i in map(_instruction, lines) if i is not None))
                name = ""
            elif name:
                lines.append(line)
        self._frames = _frames(text)
        every = ((block, instruction) for block in self.computations.values() for instruction in block.instructions)
        self._loops = {loop.called("body") or "": (block, loop) for block, loop in every if loop.opcode == "while"}

    def blocks(self, taken: Callable[[Instruction], float] = lambda _: 1.0) -> Iterator[tuple[Computation, float]]:
        """The computations that are scheduled, and how often each runs: the entry, loop bodies, branches and calls.

        Args:
            taken: how often of all times the branches of a conditional run.
        """
        yield from self._blocks(self.entry, 1, 0, taken)

    def _blocks(self, name: str, times: float, depth: int, taken: Callable[[Instruction], float]) -> Iterator[tuple[Computation, float]]:
        computation = self.computations.get(name)
        if computation is None or depth > 32:
            return
        yield computation, times
        for instruction in computation.instructions:
            yield from self.within(instruction, taken, times, depth + 1)

    def within(
        self, instruction: Instruction, taken: Callable[[Instruction], float], times: float = 1, depth: int = 0
    ) -> Iterator[tuple[Computation, float]]:
        """The computations that a loop, call or conditional schedules, as `blocks` gives them; none for other instructions."""
        if instruction.opcode == "while":
            yield from self._blocks(instruction.called("body") or "", times * self.trip_count(instruction), depth, taken)
        elif instruction.opcode == "call":
            yield from self._blocks(instruction.called("to_apply") or "", times, depth, taken)
        elif instruction.opcode == "conditional":
            for branch in self.branches(instruction):
                yield from self._blocks(branch, times * taken(instruction), depth, taken)

    @staticmethod
    def branches(conditional: Instruction) -> list[str]:
        """The computations among which a conditional chooses."""
        return re.findall(r"%([\w.\-]+)", _braced(conditional.rest, "branch_computations"))

    def trip_count(self, loop: Instruction) -> int:
        """How often a counted loop runs: what the compiler notes, or the bound that its condition compares with."""
        known = re.search(r'known_trip_count":?\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition = self.computations.get(loop.called("condition") or "")
        bounds = [1]
        for instruction in condition.instructions if condition else ():
            value = re.match(r"constant\((\d+)\)", instruction.rest) if instruction.opcode == "constant" else None
            bounds += [int(value[1])] if value else []
        return max(bounds)

    def argument(self, block: Computation, instruction: Instruction) -> str:
        """The weight or state that an instruction reads, directly or through the loops that it stands in; empty if it reads none."""
        return next(filter(None, (self._argument(block, name) for name in instruction.operands)), "")

    def _argument(self, block: Computation, name: str) -> str:
        """The weight or state that a value is, through views of it and the loops that carry it."""
        value = block.by_name.get(name)
        while value is not None and value.opcode in ("bitcast", "get-tuple-element"):
            whole, index = block.by_name.get(value.operands[0]), re.search(r"\bindex=(\d+)", value.rest)
            if index is None:  # a bitcast
                value = whole
                continue
            if whole is not None and whole.opcode == "parameter" and block.name in self._loops:
                block, loop = self._loops[block.name]
                whole = block.by_name.get(loop.operands[0])  # what the loop began with
            value = block.by_name.get(whole.operands[int(index[1])]) if whole is not None and whole.opcode == "tuple" else None
        if value is None or value.opcode != "parameter" or block.name != self.entry:
            return ""
        return value.op_name.replace("\\'", "'") if value.op_name.startswith(("params", "state")) else ""

    def source(self, instruction: Instruction) -> tuple[Frame, ...]:
        """The stack of source lines that an instruction comes from, innermost first; empty where the compiler made it up."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        stack, index = list[Frame](), int(found[1]) if found else 0
        while index in self._frames and len(stack) < 32:
            frame, parent = self._frames[index]
            stack.append(frame)
            index = parent if parent < index else 0
        return tuple(stack)


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.partition(" = ")
    if not equals:
        return None
    words = left.split()
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    opcode = _OPCODE.match(right, end)
    if opcode is None:
        return None
    close = _closing(right, opcode.end() - 1)
    operands = tuple(re.findall(r"%([\w.\-]+)", right[opcode.end() : close]))
    rest = right[opcode.start(1) :] if opcode[1] in ("constant", "parameter") else right[close + 1 :]
    return Instruction(words[-1].lstrip("%"), opcode[1], shapes(right[:end]), operands, rest, words[0] == "ROOT")


def shapes(text: str) -> tuple[Shape, ...]:
    """All arrays that a shape names."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d) for d in dims.split(",") if d)
        found.append(Shape(dtype, sizes, int(space[1]) if space else 0, _stored(sizes, layout)))
    return tuple(found)


def _stored(dims: tuple[int, ...], layout: str) -> int:
    """Elements of an array with its tiles filled up, from a layout such as `1,0:T(8,128)(2,1)`: the dimensions from the least one on, and
    the tile of the least of them. 0 without tiles."""
    tile = re.search(r":T\(([\d,]+)\)", layout)
    order = [int(d) for d in layout.partition(":")[0].split(",") if d]
    if tile is None or not dims or len(order) != len(dims):
        return 0
    sizes = [dims[dim] for dim in order]
    for place, side in enumerate(reversed([int(d) for d in tile[1].split(",")][-len(sizes) :])):
        sizes[place] = round_up(sizes[place], side)
    return math.prod(sizes)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text) - 1


def _braced(text: str, attribute: str) -> str:
    """The text between the braces of `attribute={…}`, nested ones included."""
    start = text.find(f"{attribute}={{")
    if start < 0:
        return ""
    begin = start + len(attribute) + 2
    depth = 1
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index]
    return text[begin:]


def groups(instruction: Instruction) -> list[tuple[int, ...]]:
    """The groups of devices among which a collective runs; for a permute, its pairs of source and target.

    Raises:
        ValueError: they are written in a way that is not known here; a collective must not be overlooked.
    """
    listed = _braced(instruction.rest, "replica_groups") or _braced(instruction.rest, "source_target_pairs")
    if listed:
        return [tuple(int(d) for d in part.split(",")) for part in re.findall(r"\{([\d,]+)\}", listed)]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.rest)
    if iota is None:
        return _mesh_groups(instruction)
    rows, columns = int(iota[1]), int(iota[2])
    dims = [int(d) for d in iota[3].split(",")]
    order = [int(d) for d in iota[4].split(",")] if iota[4] else list(range(len(dims)))
    flat = _transposed(dims, order)
    return [tuple(flat[row * columns : (row + 1) * columns]) for row in range(rows)]


def _mesh_groups(instruction: Instruction) -> list[tuple[int, ...]]:
    """Groups written as axes of a mesh: `mesh['a'=4,'b'=16], device_ids=([16,4]T(1,0)) {'a','b':(2)4}`, the latter the digit of 4 of b
    after a digit of 2."""
    found = re.search(
        r"replica_groups=mesh\[(?P<mesh>[^\]]*)\](?:, device_ids=\(\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))? \{(?P<axes>[^}]*)\}",
        instruction.rest,
    )
    if found is None:
        raise ValueError(f"{instruction.opcode} {instruction.name}: its groups of devices cannot be read")
    mesh = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", found["mesh"])]
    wanted = {
        (name, int(before or 1), int(size or 0)) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found["axes"])
    }
    digits: list[tuple[int, bool]] = []  # of a device's place in the mesh, major first, and whether groups run over it
    for name, size in mesh:
        parts = [(before, part or size) for other, before, part in sorted(wanted) if other == name]
        done = 1
        for before, part in parts:
            digits += [(before // done, False), (part, True)]
            done = before * part
        digits.append((size // done, False))
    devices = list(range(math.prod(size for _, size in mesh)))
    if found["dims"]:
        dims = [int(d) for d in found["dims"].split(",")]
        devices = _transposed(dims, [int(d) for d in found["order"].split(",")] if found["order"] else list(range(len(dims))))
    outside = [place for place, (_, inside) in enumerate(digits) if not inside]
    inside = [place for place, (_, inside) in enumerate(digits) if inside]
    flat = [devices[place] for place in _transposed([size for size, _ in digits], outside + inside)]
    columns = math.prod(digits[place][0] for place in inside)
    return [tuple(flat[start : start + columns]) for start in range(0, len(flat), columns)]


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """0, 1, 2, … in an array of these dimensions, read after a transpose."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    found = [0]
    for axis in order:
        found = [base + digit * strides[axis] for base in found for digit in range(dims[axis])]
    return found


def _frames(text: str) -> dict[int, tuple[Frame, int]]:
    """Stack frame → its source line and the frame that called it."""
    if "\nStackFrames" not in text:
        return {}
    tables = [text.index(f"\n{title}") for title in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")]
    files = dict(re.findall(r'^(\d+) "(.*)"$', text[tables[0] : tables[1]], re.MULTILINE))
    functions = dict(re.findall(r'^(\d+) "(.*)"$', text[tables[1] : tables[2]], re.MULTILINE))
    found = re.findall(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)", text[tables[2] : tables[3]], re.MULTILINE)
    lines = {key: Frame(_short(files.get(file, "?")), int(line), functions.get(function, "?")) for key, file, function, line in found}
    stacks = re.findall(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}", text[tables[3] :], re.MULTILINE)
    return {int(key): (lines[line], int(parent) - 1) for key, line, parent in stacks if line in lines}


def _short(path: str) -> str:
    """A file of ours by its path inside the package, any other by its name."""
    parts = PurePath(path).parts
    start = len(parts) - 1 - parts[::-1].index("partinf") if "partinf" in parts else len(parts) - 1
    return "/".join(parts[start:])
