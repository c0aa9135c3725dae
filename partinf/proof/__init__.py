"""Proofs: the real TPU compiler says whether a plan holds, on a machine that has no TPU.

`prove` compiles the very step that an engine would run, for the plan's slice, in a process of its own; what came out is read (memory,
collectives, schedule), compared with the plan entry by entry, and priced.
"""

from partinf.proof.process import CompilerFailed, Limits, unavailable
from partinf.proof.proving import prove
from partinf.proof.report import Collective, Difference, Estimate, Memory, Proof, StepProof, proof_json

__all__ = [
    "Collective",
    "CompilerFailed",
    "Difference",
    "Estimate",
    "Limits",
    "Memory",
    "Proof",
    "StepProof",
    "proof_json",
    "prove",
    "unavailable",
]
