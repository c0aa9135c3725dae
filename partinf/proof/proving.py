"""`prove` compiles the steps of a plan for its slice and reads what came out.

The time of a step is an estimate: a walk over the compiled schedule (`partinf.proof.walk`) with the compiler's cycles, the transfers of HBM
during them and every collective by the analytic model of the network with the constants of the chip (`partinf.cost.calibration`), corrected
by what was read from traces of the chip (`partinf.proof.pace`) and fitted to nothing; never below one read of weights and cache.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from partinf.buckets import held as held_by
from partinf.buckets import split_of
from partinf.cost import memory
from partinf.cost.calibration import ROOFLINE, calibration_for
from partinf.cost.collectives import Network
from partinf.cost.items import DECODE, PREFILL, WX_IN, WX_OUT, Item
from partinf.cost.ledger import Ledger, Op
from partinf.cost.pricing import Pricing
from partinf.cost.program import PLAIN, TILED
from partinf.cost.step import step_ledger
from partinf.foundation.errors import InvalidInput
from partinf.layout import AttentionRole
from partinf.plans import Bucket, Plan
from partinf.proof.compare import differences, extra_copies, planned_collectives, stored_padding
from partinf.proof.hlo import Frame, Instruction, Module
from partinf.proof.pace import pace_of, stated_byte_rate
from partinf.proof.process import Compiled, Limits, compile_bucket
from partinf.proof.report import Estimate, Memory, Proof, StepProof, Work
from partinf.proof.schedule import KernelTime, Reader, Schedule
from partinf.proof.walk import KernelRun
from partinf.workload import DType

# Unfitted readings of programs of the paper came within 2 to 15 % of what was measured on v4; one chip is not all chips.
_ERROR = 0.25
_COMPILED = replace(PLAIN, skips_windows=True)
# Kernels of ours, and the entry of the ledger that is their work.
_KERNELS = {"paged_decode": DECODE.core, "paged_write": DECODE.write, "experts_in": WX_IN.product, "experts_out": WX_OUT.product}
_WRITES = "paged_write"  # a kernel of which no time is known
_LISTED = 16  # instructions in a report
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def prove(
    plan: Plan,
    buckets: Sequence[Bucket] | None = None,
    limits: Limits | None = None,
    advance: Callable[[int], None] | None = None,
    by_compiler: bool = False,
) -> Proof:
    """Compile the steps that an engine would run: for a TPU slice without any chip, for GPUs and CPUs on the local ones.

    Args:
        buckets: those of the plan if not given. limits: of each compilation. advance: called with 1 after each bucket.
        by_compiler: prove the twin in which the compiler chooses the collectives (`partinf.transformer.compiler_partitioned`) instead.

    Raises:
        InvalidInput: no buckets, a plan that cannot run, stages for `by_compiler`, no compiler that matches jax, or GPUs that are missing.
        partinf.proof.process.CompilerFailed: the compiler crashed or exceeded a limit.
    """
    chosen = tuple(plan.buckets if buckets is None else buckets)
    if not chosen:
        raise InvalidInput("the plan has no buckets; give some, or `partinf.with_capacity`")
    if plan.num_stages > 1 and by_compiler:
        raise InvalidInput(
            f"{plan.num_stages} pipeline stages: a tick is written by hand, and the compiler has no partitioning of its own for it"
        )
    if plan.num_stages > 1:
        plan = replace(plan, buckets=chosen)  # what passes from stage to stage is that of these
    compiler, steps = "", []
    for bucket in chosen:
        compiled = compile_bucket(plan, bucket, limits or Limits(), by_compiler)
        compiler = compiled.compiler
        steps.append(_read(plan, bucket, compiled))
        if advance is not None:
            advance(1)
    planned = held_by(plan if plan.buckets else replace(plan, buckets=chosen))
    return Proof(plan.model.name, plan.slice.name, compiler, tuple(steps), planned)


def _read(plan: Plan, bucket: Bucket, compiled: Compiled) -> StepProof:
    usable = memory.usable_bytes(plan.slice)
    if compiled.refusal:
        needed, limit = refused_bytes(compiled.refusal)
        held = Memory(0, 0, 0, 0, 0, needed, limit or usable)
        message = compiled.refusal.splitlines()[0]
        return StepProof(str(bucket), False, held, compiled.seconds, refusal=message, advice=_advice(plan, bucket, held))
    held = _memory(compiled.memory, usable)
    ledger = step_ledger(split_of(plan, bucket, Pricing(plan.slice, ROOFLINE, program=_COMPILED)))
    network, schedule = network_of(plan), schedule_of(plan, bucket, compiled.program)
    estimate = _estimate(plan, ledger, schedule)

    def seconds(op: str, axes: tuple[str, ...], num_bytes: int) -> float:
        return network.seconds(Op(op), axes, num_bytes) if op in list(Op) else 0.0

    found = differences(planned_collectives(ledger, plan.axis_sizes), schedule.collectives, seconds)
    found += extra_copies(schedule.work, estimate.seconds)
    found += stored_padding(held.arguments, _stored(plan, bucket))
    return StepProof(
        str(bucket),
        held.needed <= held.usable,
        held,
        compiled.seconds,
        schedule.collectives,
        tuple(sorted(found, key=lambda d: -abs(d.seconds))),
        _listed(schedule.work),
        estimate,
        planned_ledger(plan, bucket).seconds,
    )


def network_of(plan: Plan) -> Network:
    """Times of the plan's collectives, by the constants of its chip."""
    return Pricing(plan.slice, calibration_for(plan.slice.chip)).network


def schedule_of(plan: Plan, bucket: Bucket, program: str) -> Schedule:
    """A compiled step as a proof reads it. A kernel of ours takes what the cost model says of its work, and its bytes run at the rate of a
    transfer: what a whole step loses between transfers, which `Calibration.hbm_share` holds, is the walk's to find."""
    pace, calibration = pace_of(plan.slice), calibration_for(plan.slice.chip)
    pricing = Pricing(plan.slice, replace(calibration, hbm_share=pace.byte_rate / stated_byte_rate(plan.slice.chip)), program=TILED)
    ledger, fresh = (step_ledger(split_of(plan, one, pricing)) for one in (bucket, replace(bucket, prefill_pages=0)))
    kernels = {name: _from_ledger(ledger, item) for name, item in _KERNELS.items()}
    kernels["prompt_attention"] = _from_ledger(fresh, PREFILL.core)
    return Reader(Module(program), plan.slice, network_of(plan), _taken(plan, bucket), kernels, pace).read()


def _taken(plan: Plan, bucket: Bucket) -> Callable[[Sequence[Frame]], float]:
    """How often a branch is taken: attention skips tiles of prompts that no query sees, if prompts of one length fill the bucket. Layers
    are counted together: of a window no more is seen than what it reaches beyond a tile."""
    from partinf.transformer.kernels import tiles as kernels  # jax is loaded with these, and a proof that is refused earlier needs none
    from partinf.transformer.routes import Routes

    routes = Routes(plan, bucket)
    ways = routes.ways(routes.prefill.batch)
    heads = plan.padded_model.num_heads // routes.ways(routes.prefill.heads)
    source = kernels.__name__.replace(".", "/") + ".py"
    tiles = plan.slice.chip.platform.tiles
    tokens, windows = bucket.prefill_tokens // ways, plan.model.windows
    causal, together = tiles.seen_shares(tokens, bucket.prefill_slots // ways, heads)
    reached = [(min(causal, (window + tiles.prompt_keys) / max(tokens, 1)), count) for window, count in windows]
    seen = sum(share * count for share, count in reached) / plan.model.num_layers

    def taken(lines: Sequence[Frame]) -> float:
        functions = [line.function for line in lines if line.file.endswith(source)]
        if any(".slot" in name for name in functions):
            return 1.0 if any(".slot.<locals>.tile" in name for name in functions) else together
        return seen if any(name.startswith("prefill") for name in functions) else 1.0

    return taken


def _memory(kinds: dict[str, int], usable: int) -> Memory:
    fresh = max(0, kinds["output"] - kinds["alias"])
    needed = kinds["argument"] + kinds["temp"] + kinds["generated_code"] + fresh
    return Memory(kinds["argument"], kinds["temp"], kinds["output"], kinds["alias"], kinds["generated_code"], needed, usable)


def _listed(work: Sequence[Work]) -> tuple[Work, ...]:
    """The dearest, and the others as one, so that they sum to the whole."""
    rest = work[_LISTED:]
    what = f"{len(rest)} instructions that take less"
    others = [Work(what, 1, sum(one.seconds * one.count for one in rest), 0, False, "")] if rest else []
    return (*work[:_LISTED], *others)


def _from_ledger(ledger: Ledger, item: Item) -> Callable[[Instruction, float], KernelRun]:
    """One run of a kernel that does the work of an entry."""
    found = Ledger(tuple(entry for entry in ledger.entries if entry.item == item))
    moved = found.weight_bytes + found.kv_bytes + found.activation_bytes
    return lambda _, runs: KernelRun(found.seconds / runs, moved / runs)


def _estimate(plan: Plan, ledger: Ledger, schedule: Schedule) -> Estimate:
    hidden = sum(c.seconds * c.count * c.overlapped_fraction for c in schedule.collectives)
    exposed = sum(c.exposed_seconds for c in schedule.collectives)
    floor = (ledger.weight_bytes + ledger.kv_bytes) / stated_byte_rate(plan.slice.chip)
    compute, notes = schedule.compute_seconds, []
    if not plan.slice.chip.clock:
        compute = max(compute, sum(e.exposed_seconds for e in ledger.entries if e.op is None))
        notes.append(f"the clock of {plan.slice.chip.name} is not known: compute is that of the plan's roofline")
    notes += [f"kernel {name}: {_kernel_note(name, kernel)}" for name, kernel in sorted(schedule.kernels.items())]
    of_kernels = sum(kernel.seconds for kernel in schedule.kernels.values())
    return Estimate(compute, exposed, hidden, floor, _ERROR, "; ".join(notes), of_kernels)


def _kernel_note(name: str, kernel: KernelTime) -> str:
    how = "priced from the ledger" if kernel.known else "no time is known, priced at one read of all that it is handed"
    how = "priced at half of the rate of a transfer" if name == _WRITES else how
    return f"{how}, {1e3 * kernel.seconds:.3g} ms in all"


def planned_ledger(plan: Plan, bucket: Bucket) -> Ledger:
    """What the calibrated cost model says of this program in this bucket."""
    return step_ledger(split_of(plan, bucket, Pricing(plan.slice, calibration_for(plan.slice.chip), program=TILED)))


def _stored(plan: Plan, bucket: Bucket) -> int:
    """Weights and cache on one device, as planned."""
    found = held_by(replace(plan, buckets=(bucket,)))
    return found.room.weights + found.cache


def refused_bytes(message: str) -> tuple[int, int]:
    """Bytes needed and bytes available, from the compiler's refusal; 0 where it does not say."""
    for pattern in (
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    ):
        found = re.search(pattern, message)
        if found:
            return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])
    return 0, 0


def _advice(plan: Plan, bucket: Bucket, held: Memory) -> str:
    """The smallest changes that fit, by the plan's account of what each saves."""
    found = []
    for label, changed in (
        ("int8 weights", replace(plan, weights=DType.INT8, predicted=())),
        ("an int8 cache", replace(plan, kv=DType.INT8, predicted=())),
        ("int8 weights and cache", replace(plan, weights=DType.INT8, kv=DType.INT8, predicted=())),
    ):
        saved = _stored(plan, bucket) - _stored(changed, bucket)
        if held.needed and saved > 0 and held.needed - saved <= held.usable:
            found.append(f"{label} (saves {saved / 1e9:.2f} GB per device)")
            break
    larger = _larger(plan, held)
    if larger:
        found.append(larger)
    if not found and plan.ways(plan.layout.decode.attention_axes(AttentionRole.BATCH)) < math.prod(plan.axis_sizes.values()):
        found.append("attention over batch on all axes, which splits the cache over all devices")
    return "; or ".join(found)


def _larger(plan: Plan, held: Memory) -> str:
    """The slice whose devices would hold these bytes: this one with its shortest sides doubled."""
    slice_ = plan.slice
    shape, total = list(slice_.shape), held.needed * math.prod(slice_.shape)
    while held.needed and total > held.usable * math.prod(shape):
        side = shape.index(min(shape))
        shape[side] *= 2
        if shape[side] > slice_.chip.max_axis:
            return ""
    return f"{replace(slice_, shape=tuple(shape)).name}, over whose devices these bytes fit" if held.needed else ""
