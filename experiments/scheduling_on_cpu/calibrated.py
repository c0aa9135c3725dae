"""Step times from `partinf calibrate` alone: the command is run as a user would, and its hardware file prices the steps of a plan."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from partinf import api
from partinf.buckets import split_of
from partinf.cost.calibration import calibration_for
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED
from partinf.cost.step import step_ledger
from partinf.hardware.slices import Slice
from partinf.plans import Plan
from partinf.simulation.step_price import StepPrice


def calibrated_slice(seconds: int = 30) -> Slice:
    """The one CPU device that is here, as the command finds it now."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "hardware.toml"
        command = [sys.executable, "-m", "partinf", "calibrate", "--types", "f32", "--seconds", str(seconds), "--output", str(path)]
        subprocess.run(command, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, stdout=subprocess.DEVNULL, check=True)
        return api.find_slice("local", hardware=path)


def calibrated_buckets(plan: Plan, slice_: Slice) -> dict[str, float]:
    """Seconds of every compiled step of a plan."""
    plan = replace(plan, slice=slice_)
    return {str(bucket): step_ledger(split_of(plan, bucket, _pricing(slice_))).seconds for bucket in plan.buckets}


def calibrated_price(plan: Plan, slice_: Slice) -> StepPrice:
    """Prices the steps of a plan as they are padded to its buckets."""
    return StepPrice(replace(plan, slice=slice_), _pricing(slice_), buckets=plan.buckets)


def _pricing(slice_: Slice) -> Pricing:
    return Pricing(slice_, calibration_for(slice_.chip), program=TILED)
