"""What a proof says, as types; and as the JSON that `partinf prove` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from partinf.cost.memory import Held


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, the compiler's own figures; of a program that it refused only `needed` is known.

    Attributes:
        arguments: weights, cache and the batch. aliased: the part of the output that reuses them (the cache).
        needed: arguments, temporaries, code, and output that aliases nothing; `fits` compares it with `usable`.
    """

    arguments: int
    temporaries: int
    output: int
    aliased: int
    code: int
    needed: int
    usable: int


@dataclass(frozen=True)
class Collective:
    """Equal collectives of the compiled program.

    Attributes:
        op: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute. axes: mesh axes, in mesh order.
        bytes: payload of one: the output of an all-gather, the input of the others. count: how many run in a step.
        seconds: of one, by the analytic model of the network. overlapped_fraction: the part of it that is overlapped with compute.
        source_op: the line of ours that it comes from. requested: what our program requested there, if not this op.
        merged: how many of ours the compiler made one op of.
    """

    op: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    count: int
    seconds: float
    overlapped_fraction: float
    source_op: str
    requested: str
    merged: int = 1

    @property
    def exposed_seconds(self) -> float:
        """What all of them add to the step."""
        return self.seconds * self.count * (1 - self.overlapped_fraction)


@dataclass(frozen=True)
class Work:
    """An instruction that is no collective.

    Attributes:
        count: how often it runs in a step. seconds: of one. num_bytes: of its result. moves: whether it only moves data.
    """

    what: str
    count: int
    seconds: float
    num_bytes: int
    moves: bool
    source_op: str


@dataclass(frozen=True)
class Difference:
    """One way in which the compiled program is not the planned one.

    Attributes:
        kind: reduce-scatter turned all-reduce, wider type, merged collectives, padding, extra copy, other collective, or
            eliminated (planned, and not in the compiled program).
        what: one sentence. count: occurrences per step. seconds: what it adds to the step, negative for a gain.
        source_op: the line of ours that it comes from, if known.
    """

    kind: str
    what: str
    count: int
    seconds: float
    source_op: str = ""


@dataclass(frozen=True)
class Estimate:
    """Time of one step.

    Attributes:
        compute: what the core does and waits for, but for collectives. collectives: exposed time. overlapped: hidden time.
        floor: weights and cache read once at the full bandwidth of HBM; no step is shorter.
        error: relative error to expect. note: what the estimate leaves out or borrows.
        kernels: the part of `compute` behind which no cycles of the compiler stand, but a rate or the ledger; `note` says which.
    """

    compute: float
    collectives: float
    overlapped: float
    floor: float
    error: float
    note: str = ""
    kernels: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.floor, self.compute + self.collectives)


@dataclass(frozen=True)
class StepProof:
    """One bucket compiled.

    Attributes:
        refusal: the compiler's message when it does not fit. advice: the smallest change that would make it fit.
        work: the most expensive instructions, without collectives, and all others as one. estimate: None when it does not fit.
        planned_seconds: what the plan's own account says for the same bucket.
    """

    bucket: str
    fits: bool
    memory: Memory
    compile_seconds: float
    collectives: tuple[Collective, ...] = ()
    differences: tuple[Difference, ...] = ()
    work: tuple[Work, ...] = ()
    estimate: Estimate | None = None
    planned_seconds: float = 0.0
    refusal: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Proof:
    """A plan, compiled for its slice by the compiler that its chips will run.

    Attributes:
        steps: one per bucket. planned: what a device holds by the plan's own account, for all steps of the engine.
    """

    model: str
    slice: str
    compiler: str
    steps: tuple[StepProof, ...] = field(default=())
    planned: Held | None = None

    @property
    def fits(self) -> bool:
        """Whether every bucket fits."""
        return all(step.fits for step in self.steps)


def proof_json(proof: Proof) -> dict[str, Any]:
    """The JSON of a proof: the figures of the first bucket at the top level, and every bucket under `steps`."""
    steps = [_step_json(step) for step in proof.steps]
    head = {"model": proof.model, "slice": proof.slice, "compiler": proof.compiler}
    planned = None if proof.planned is None else proof.planned.as_json()
    return {**head, **(steps[0] if steps else {}), "fits": proof.fits, "planned_memory": planned, "steps": steps}


def _step_json(step: StepProof) -> dict[str, Any]:
    estimate = step.estimate
    return {
        "bucket": step.bucket,
        "fits": step.fits,
        "memory": asdict(step.memory),
        "collectives": [asdict(collective) for collective in step.collectives],
        "step_seconds_estimate": None if estimate is None else estimate.seconds,
        "estimate": None if estimate is None else asdict(estimate),
        "planned_seconds": step.planned_seconds,
        "compile_seconds": step.compile_seconds,
        "differences": [asdict(difference) for difference in step.differences],
        "work": [asdict(one) for one in step.work],
        "refusal": step.refusal,
        "advice": step.advice,
    }
