"""A second opinion on a candidate: the traced program counted, and priced by a formula that shares nothing with the planner's.

    step = Σ dots max(FLOPs / peak, bytes / HBM bandwidth) + Σ collectives (bytes over links + hops · 1 µs)

Every dot reads its operands and writes its result once; weights that are stored as int8 and widened for the product count as int8 (a
compiler fuses the conversion), or, in the second of two judgements, as they are multiplied. A collective over K chips moves
payload · (K-1)/K through each chip, an all-reduce twice that; on a torus it uses one link each way of every axis it runs over (one link
alone where an axis does not wrap), on a switch a chip's port. Half of an all-to-all's bytes cross the middle of each axis; a permute sends
all of them over one link. No constant is fitted, except in a third judgement, which takes the planner's own constants of the chip so that
nothing but the program differs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from partinf.buckets import serving_steps
from partinf.cost.calibration import ROOFLINE, Calibration, calibration_for
from partinf.hardware.slices import Slice
from partinf.layout import Layout
from partinf.planner.report import PlanReport
from partinf.planner.results import Candidate
from partinf.plans import Bucket, Plan
from partinf.transformer.account import Account, Collective, trace_account

HOP_SECONDS = 1e-6


class Judged(NamedTuple):
    """Seconds of a candidate's step: at the maker's figures; the same with int8 weights as they are multiplied; at the constants that the
    planner uses for the chip."""

    stated: float
    unfused: float
    fitted: float


def judged(report: PlanReport, candidate: Candidate) -> Judged:
    """The step of a candidate under this account; with pipeline stages all the ticks in which the batch passes through."""
    plan, bucket = program_of(report, candidate)
    account = trace_account(plan, bucket)
    constants = calibration_for(report.slice.chip)
    prices = (price(account, report.slice), price(account, report.slice, fused=False), price(account, report.slice, constants))
    return Judged(*(plan.num_stages * seconds for seconds in prices))


def program_of(report: PlanReport, candidate: Candidate) -> tuple[Plan, Bucket]:
    """The plan and bucket that run the report's step: rows, tokens and slots rounded up to what the roles divide."""
    workload, phase = report.workload, candidate.main.phase
    layout = Layout(candidate.layout.storage, phase, phase)
    plan = Plan(report.model, report.slice, layout, workload.weights, workload.kv, padded_heads=candidate.padded_heads)
    plan, (bucket,) = serving_steps(plan, workload)
    return replace(plan, buckets=(bucket,)), bucket


def price(account: Account, slice_: Slice, constants: Calibration = ROOFLINE, fused: bool = True) -> float:
    """Seconds of a counted step."""
    chip, dots = slice_.chip, 0.0
    flop_rate, byte_rate = chip.peak_bf16 * constants.matmul_efficiency, chip.hbm_bandwidth * constants.hbm_share
    for dot, count in account.dots.items():
        times = dot.flops / flop_rate, (dot.stored_bytes if fused else dot.num_bytes) / byte_rate
        dots += count * (max(times) if constants.hides_memory else sum(times))
    hop = constants.hop_seconds or HOP_SECONDS
    fixed = constants.collective_seconds
    rings = constants.switch_rings
    return dots + sum(n * (fixed + collective_seconds(collective, slice_, hop, rings)) for collective, n in account.collectives.items())


def collective_seconds(collective: Collective, slice_: Slice, hop: float = HOP_SECONDS, switch_rings: bool = False) -> float:
    """One collective: bytes over links, and one hop at a time to the farthest chip; through a switch one, or one per further device."""
    chip, axes = slice_.chip, [axis for axis in slice_.axes if axis.name in collective.axes]
    ways = math.prod(axis.size for axis in axes)
    if collective.op == "collective-permute":
        return collective.num_bytes / (chip.link_bandwidth if chip.torus_dims else chip.switch_bandwidth) + hop
    if chip.torus_dims == 0:
        passes = 2 if collective.op == "all-reduce" else 1
        return passes * (collective.num_bytes * (ways - 1) / ways / chip.switch_bandwidth + hop * (ways - 1 if switch_rings else 1))
    links = {axis.name: 2 if axis.wraps else 1 for axis in axes}
    hops = hop * sum(axis.size // 2 if axis.wraps else axis.size - 1 for axis in axes)
    if collective.op == "all-to-all":
        crossing = max(axis.size / 2 * collective.num_bytes / 2 / links[axis.name] for axis in axes)
        return crossing / chip.link_bandwidth + hops
    passes = 2 if collective.op == "all-reduce" else 1
    return passes * (collective.num_bytes * (ways - 1) / ways / (sum(links.values()) * chip.link_bandwidth) + hops)
