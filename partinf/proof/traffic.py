"""HBM traffic of a scheduled instruction: what it reads and writes, where slices of stacked arrays count as what they touch.

A fusion that slices one layer out of stacked weights reads that layer alone, one that updates a page of the cache in place writes that
page alone. An asynchronous transfer (`copy-start`, `slice-start`) is charged where it starts, for the part that it moves.
Arrays in on-chip memory count nothing.
"""

from __future__ import annotations

import math
import re

from partinf.proof.hlo import Computation, Instruction, Module

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all", "opt-barrier"}
_FREE |= {"partition-id", "replica-id", "iota", "reshape", "call-start", "send", "recv"}
# Custom calls of the compiler that name memory anew, or only promise something.
_FREE_CALLS = ("ConcatBitcast", "AssumeGatherIndicesInBound")
_SEMAPHORE = 2  # the memory space of what a transfer signals with
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_RAGGED = {"ragged-all-to-all": "all-to-all"}
_BETWEEN_SLICES = {"ONE_TO_ONE": "collective-permute"}  # the others have the names of collectives
_VIEWS = {"bitcast", "reshape", "transpose", "copy"}
_MOVING = {*_VIEWS, "convert", "broadcast", "slice", "dynamic-slice", "dynamic-update-slice", "pad", "concatenate"}
_SLICES = ("dynamic-slice", "slice", "gather")
# Which operand of an update in place holds the new values.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
_INTEGERS = {"s8", "u8"}
_DEEPEST = 6  # views and fusions within fusions that are followed


def collective_op(instruction: Instruction) -> str | None:
    """The kind of a collective, of the instruction that starts it where it is split in two; None for others.

    Raises:
        ValueError: a transfer between slices of a kind that is not known here; a collective must not be overlooked.
    """
    op = instruction.opcode.removesuffix("-start")
    op = _RAGGED.get(op, op)
    if instruction.opcode == "send":  # between slices: the hosts do it
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
        op = _BETWEEN_SLICES.get(found[1], found[1].lower().replace("_", "-")) if found else ""
        if found and op not in COLLECTIVES:
            raise ValueError(f"send {instruction.name}: {found[1]} between slices is no collective that is known here")
    return op if op in COLLECTIVES else None


def collective_of(module: Module, block: Computation, instruction: Instruction) -> tuple[Computation, Instruction] | None:
    """The collective that an instruction is, starts, or holds fused as a whole; with the computation it stands in."""
    if collective_op(instruction):
        return block, instruction
    if instruction.opcode not in ("call-start", "async-start", "fusion"):
        return None
    stage = stage_of(module, instruction)
    if stage is not None and stage[0] != "start":
        return None
    called = module.computations.get(instruction.called("to_apply") or instruction.called("calls") or "")
    inner = next((inner for inner in called.instructions if collective_op(inner)), None) if called else None
    return (called, inner) if called and inner else None


def stage_of(module: Module, instruction: Instruction) -> tuple[str, str] | None:
    """What a fusion does for a collective that is spread over several of them: `start`, `step` or `done`, and the collective's channel.

    A TPU's compiler cuts such a collective into a fusion that starts it, fusions of other work that carry it forward meanwhile, and
    one that ends it. All of them name it, and none but the first is another collective.
    """
    called = module.computations.get(instruction.called("calls") or "") if instruction.opcode == "fusion" else None
    inner = next((inner for inner in called.instructions if collective_op(inner)), None) if called else None
    if called is None or inner is None:
        return None
    channel = re.search(r"channel_id=(\d+)", inner.rest)
    for stage, mark in (("start", '"AsyncCollectiveStart"'), ("done", '"AsyncCollectiveDone"')):
        if any(mark in one.rest for one in called.instructions if one.opcode == "custom-call"):
            return stage, channel[1] if channel else ""
    return ("step", channel[1] if channel else "") if called.name.startswith("async_collective_fusion") else None


def is_kernel(instruction: Instruction) -> bool:
    """A program of its own within the program, of which the compiler knows neither cycles nor what it reads of its operands."""
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.rest and not instruction.cycles


def kernel_bytes(computation: Computation, kernel: Instruction) -> int:
    """Bytes of HBM that a kernel is handed and makes: more than it moves where it picks, and all that is known of an unknown one."""
    operands = [computation.by_name[name] for name in kernel.operands if name in computation.by_name]
    return sum(shape.hbm_bytes for one in (*operands, kernel) for shape in one.shapes)


def product_of(module: Module, computation: Computation, instruction: Instruction) -> tuple[float, bool] | None:
    """Multiplications and additions of a product, alone or fused with what stands around it, and whether of integers; None for others.

    An upper bound where a product has dimensions of a batch.
    """
    found = _products(module, computation, instruction)
    if not found:
        return None
    total, integers = 0.0, True
    for home, product in found:
        sides = [home.by_name[name].shapes[0] for name in product.operands[:2] if name in home.by_name and home.by_name[name].shapes]
        total += 2 * math.sqrt(math.prod(math.prod(shape.dims) for shape in (*sides, product.shapes[0])))
        integers = integers and all(shape.dtype in _INTEGERS for shape in sides)
    return total, integers


def _products(module: Module, home: Computation, instruction: Instruction, depth: int = 0) -> list[tuple[Computation, Instruction]]:
    if instruction.opcode in ("convolution", "dot"):
        return [(home, instruction)]
    called = module.computations.get(instruction.called("calls") or "") if instruction.opcode == "fusion" else None
    if called is None or depth >= _DEEPEST:
        return []
    return [found for inner in called.instructions for found in _products(module, called, inner, depth + 1)]


def only_moves(module: Module, instruction: Instruction) -> bool:
    """Whether an operation, alone or fused, computes nothing: it copies, picks, lays out anew or converts."""
    if instruction.opcode in _MOVING:
        return True
    called = module.computations.get(instruction.called("calls") or "") if instruction.opcode == "fusion" else None
    return called is not None and all(inner.opcode in _MOVING | {"parameter", "constant", "tuple"} for inner in called.instructions)


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one execution moves between HBM and the chip; collectives and kernels are priced elsewhere."""
    if (
        is_kernel(instruction)
        or instruction.opcode in _FREE
        or instruction.opcode.endswith("-done")
        or collective_of(module, computation, instruction)
    ):
        return 0
    stage = stage_of(module, instruction)
    if stage is not None and stage[0] == "done":
        return 0
    if any(f'custom_call_target="{target}"' in instruction.rest for target in _FREE_CALLS):
        return 0
    operands = [computation.by_name.get(name) for name in instruction.operands]
    given = [operand.shapes if operand else () for operand in operands]
    sizes = [sum(shape.hbm_bytes for shape in shapes) for shapes in given]
    op, results = instruction.opcode, instruction.shapes
    called = module.computations.get(instruction.called("calls") or "")
    if op == "async-start":  # whatever it wraps
        return sum(hbm_bytes(module, called, inner) for inner in called.instructions) if called else 0
    if op == "copy-start":  # (target, source, semaphore)
        results = results[:1]
    elif op.endswith("-start"):  # ((sources), target, semaphore)
        op, results = op.removesuffix("-start"), tuple(s for s in results[sum(map(len, given)) :] if s.space != _SEMAPHORE)
    written = sum(shape.hbm_bytes for shape in results)
    if called is not None and op == "fusion":
        return _fusion_bytes(module, called, sizes, written - _handed_on(called, instruction))
    if op in _SLICES:
        return (sum(shape.stored_bytes for shape in results) if sizes and sizes[0] else 0) + written
    if op in _UPDATES:
        index = _UPDATES[op]
        return sizes[index] + (sum(shape.num_bytes for shape in given[index]) if written else 0)
    return sum(sizes) + written


def _fusion_bytes(module: Module, called: Computation, sizes: list[int], written: int) -> int:
    total = 0
    for index, name in _parameters(called).items():
        size = sizes[index] if index < len(sizes) else 0
        touched, updated = _touched(module, called, name)
        total += size if touched is None else min(size, touched)
        if updated and size:
            written = max(0, written - size) + updated
    return total + written


def _handed_on(called: Computation, fusion: Instruction) -> int:
    """Bytes of results that a fusion only passes on, or that belong to a collective which it carries forward."""
    root = called.instructions[-1]
    if root.opcode != "tuple" or len(root.operands) != len(fusion.shapes):
        return 0
    made = [called.by_name.get(name) for name in root.operands]
    passed = (shape for one, shape in zip(made, fusion.shapes, strict=True) if one and (one.opcode == "parameter" or collective_op(one)))
    return sum(shape.hbm_bytes for shape in passed)


def _parameters(called: Computation) -> dict[int, str]:
    """Parameter number → name."""
    found = [i for i in called.instructions if i.opcode == "parameter"]
    return {int(i.rest.removeprefix("parameter(").partition(")")[0]): i.name for i in found}


def _touched(module: Module, called: Computation, name: str, depth: int = 0) -> tuple[int | None, int]:
    """Bytes of a parameter that a fusion reads, None for all of it; and, where it is updated in place, the bytes written to it."""
    read, updated = 0, 0
    for user in called.instructions:
        if name not in user.operands or collective_op(user) or (user.root and user.opcode == "tuple"):
            continue  # a collective is priced elsewhere, and what is handed on is not read
        inner: tuple[int | None, int] = None, 0
        if user.opcode in _SLICES and user.operands[0] == name:
            inner = sum(shape.stored_bytes for shape in user.shapes), 0
        elif user.opcode in _UPDATES and user.operands[0] == name:
            update = called.by_name.get(user.operands[_UPDATES[user.opcode]])
            inner = 0, sum(shape.num_bytes for shape in update.shapes) if update else 0
        elif depth < _DEEPEST and not user.root and _is_view(module, user):
            inner = _touched(module, called, user.name, depth + 1)
        elif user.opcode == "fusion" and depth < _DEEPEST:
            inner = _touched_inside(module, user, name, depth + 1)
        if inner[0] is None:
            return None, 0
        read, updated = read + inner[0], updated + inner[1]
    return read, updated


def _is_view(module: Module, user: Instruction) -> bool:
    """Whether an instruction within a fusion only renames what it is given: nothing is read before something slices it."""
    if user.opcode in _VIEWS:
        return True
    called = module.computations.get(user.called("calls") or "") if user.opcode == "fusion" else None
    return called is not None and all(i.opcode == "parameter" or i.opcode in _VIEWS for i in called.instructions)


def _touched_inside(module: Module, fusion: Instruction, name: str, depth: int) -> tuple[int | None, int]:
    """The same for an operand of a fusion within a fusion."""
    called = module.computations.get(fusion.called("calls") or "")
    if called is None:
        return None, 0
    parameters = _parameters(called)
    read, updated = 0, 0
    for index, operand in enumerate(fusion.operands):
        if operand == name:
            inner, more = _touched(module, called, parameters[index], depth)
            if inner is None:
                return None, 0
            read, updated = read + inner, updated + more
    return read, updated
