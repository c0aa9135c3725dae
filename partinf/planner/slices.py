"""`--slice auto:CHIP`: the cheapest slice of a chip that keeps a latency bound.

One shape per number of chips is tried, the most cubic with sides that are powers of two: those are what models' dimensions divide, and
a longer shape of as many chips has fewer links across its middle. Cost is chip-seconds of the step or the workload that was asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from partinf.cost.collectives import BandwidthModel
from partinf.cost.pricing import LOOPED, Program
from partinf.cost.roofline import shapes
from partinf.errors import InvalidInput
from partinf.hardware import Chip, Slice, make_slice
from partinf.model_config import ModelConfig
from partinf.planner.report import PlanReport
from partinf.planner.search import search
from partinf.workload import Workload

MOST_CHIPS = 512
_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Trial:
    """The best layout on one slice."""

    report: PlanReport

    @property
    def accepted(self) -> bool:
        """It fits and meets the bound."""
        return self.report.best.fits and self.report.best.meets_bound

    @property
    def seconds(self) -> float:
        """What the bound is on: the step, or the whole request."""
        return self._with_prefills(1)

    @property
    def chip_seconds(self) -> float:
        """Of the step, or of everything that the whole batch needs."""
        return self.report.slice.num_chips * self._with_prefills(self.report.workload.num_prefills)

    def _with_prefills(self, count: int) -> float:
        best, workload = self.report.best, self.report.workload
        prefill, decode = best.phase("prefill"), best.phase("decode")
        if workload.phase or prefill is None or decode is None:
            return best.asked.step_seconds
        return count * prefill.step_seconds + workload.output_len * decode.step_seconds


def cheapest(
    model: ModelConfig,
    chip: Chip,
    workload: Workload,
    *,
    calibration: str = "fitted",
    bandwidth_model: BandwidthModel = BandwidthModel.AXIS,
    program: Program = LOOPED,
) -> list[Trial]:
    """Slices that were tried, those that keep the bound first and the cheapest of them foremost.

    Raises:
        InvalidInput: no slice holds the model or none keeps the bound; the one that comes nearest.
    """
    trials = []
    least = model.num_params() * workload.weights.num_bytes
    for slice_ in slices_of(chip):
        if slice_.num_devices * chip.usable_hbm_per_device() < least:
            continue
        try:
            found = search(model, slice_, workload, calibration=calibration, bandwidth_model=bandwidth_model, program=program)
        except InvalidInput:  # its axes do not divide the model; another size may
            continue
        if found.best.fits:
            trials.append(Trial(found))
    if not trials:
        raise InvalidInput(f"model {model.name} fits no slice of {chip.name} of up to {MOST_CHIPS} chips")
    if not any(trial.accepted for trial in trials):
        near = min(trials, key=lambda trial: trial.seconds)
        bound, took = (workload.max_latency or 0.0) * 1e3, near.seconds * 1e3
        raise InvalidInput(f"no slice of {chip.name} keeps {bound:g} ms; the fastest, {near.report.slice.name}, takes {took:.4g} ms")
    return sorted(trials, key=lambda trial: (not trial.accepted, trial.chip_seconds))


def slices_of(chip: Chip, most_chips: int = MOST_CHIPS) -> list[Slice]:
    """The most cubic shape of every number of chips, fewest first, sides powers of two."""
    found: dict[int, tuple[int, ...]] = {}
    for shape in shapes(chip, most_chips):
        if all(side & (side - 1) == 0 for side in shape):
            found.setdefault(math.prod(shape), shape)
    return [make_slice(chip, shape) for shape in found.values()]


def price_per_million_tokens(trial: Trial, per_chip_hour: float) -> float:
    """Money for a million tokens under the best candidate: generated ones of a whole workload, those of the step of one phase."""
    workload, best = trial.report.workload, trial.report.best
    tokens = best.asked.tokens if workload.phase or not workload.output_len else workload.batch * workload.output_len
    return trial.chip_seconds / _SECONDS_PER_HOUR * per_chip_hour / tokens * 1e6
