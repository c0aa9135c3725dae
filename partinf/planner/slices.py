"""Searches over slices and meshes: `--slice auto:CHIP`, the cheapest slice that keeps a latency bound, and `--mesh auto`.

One shape per number of chips is tried first, the most cubic with sides that are powers of two: those are what models' dimensions divide,
and a longer shape of as many chips has fewer links across its middle. Of the cheapest number all shapes are tried. Cost is chip-seconds of
the step or the workload that was asked for. A mesh may split a torus axis in two, whose factors then have roles of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from partinf.cost.collectives import BandwidthModel
from partinf.cost.pricing import LOOPED, Program
from partinf.cost.roofline import shapes
from partinf.errors import InvalidInput
from partinf.hardware import Chip, Link, Slice, make_slice
from partinf.model_config import ModelConfig
from partinf.planner.report import PlanReport
from partinf.planner.search import MOST_AXES, search
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
    least = model.num_params() * workload.weights.num_bytes
    large = [slice_ for slice_ in slices_of(chip) if slice_.num_devices * chip.usable_hbm_per_device() >= least]

    def ask(slice_: Slice) -> PlanReport:
        return search(model, slice_, workload, calibration=calibration, bandwidth_model=bandwidth_model, program=program)

    trials = _trials(ask, large)
    if not trials:
        raise InvalidInput(f"model {model.name} fits no slice of {chip.name} of up to {MOST_CHIPS} chips")
    if not any(trial.accepted for trial in trials):
        near = min(trials, key=lambda trial: trial.seconds)
        bound, took = (workload.max_latency or 0.0) * 1e3, near.seconds * 1e3
        raise InvalidInput(f"no slice of {chip.name} keeps {bound:g} ms; the fastest, {near.report.slice.name}, takes {took:.4g} ms")
    first = min(trials, key=_by_cost).report.slice
    trials += _trials(ask, (slice_ for slice_ in _shapes_of(chip, first.num_chips) if slice_.shape != first.shape))
    return sorted(trials, key=_by_cost)


def every_mesh(
    model: ModelConfig,
    slice_: Slice,
    workload: Workload,
    *,
    calibration: str = "fitted",
    bandwidth_model: BandwidthModel = BandwidthModel.AXIS,
    program: Program = LOOPED,
) -> list[Trial]:
    """The best layout of every mesh of a slice, the fastest first.

    Raises:
        InvalidInput: no mesh holds the model.
    """

    def ask(slice_: Slice) -> PlanReport:
        return search(model, slice_, workload, calibration=calibration, bandwidth_model=bandwidth_model, program=program)

    trials = _trials(ask, meshes_of(slice_), fitting=False) or [Trial(ask(slice_))]  # the latter says why there is none
    return sorted(trials, key=lambda trial: (not trial.report.best.fits, not trial.accepted, trial.report.best.score))


def meshes_of(slice_: Slice) -> list[Slice]:
    """The slice as it is, and with one axis split in two; equal axes are split once, and no mesh has more axes than are searched."""
    free = [axis for axis in slice_.axes if axis.size > 1 and axis.link in (Link.TORUS, Link.SWITCH)]
    found = [slice_]
    if sum(axis.size > 1 for axis in slice_.axes) >= MOST_AXES:
        return found
    seen = set()
    for axis in free:
        kind = (axis.size, axis.wraps, axis.link)
        if kind in seen or (axis.size != axis.torus_size and axis.link is Link.TORUS):
            continue
        seen.add(kind)
        for outer in range(2, axis.size // 2 + 1):
            if axis.size % outer == 0:
                parts = [f"{a.name}:{a.size}" if a is not axis else f"{a.name}0:{outer},{a.name}1:{axis.size // outer}" for a in free]
                ones = [f"{a.name}:1" for a in slice_.axes if a.size == 1 and a.link in (Link.TORUS, Link.SWITCH)]
                found.append(slice_.with_mesh(",".join(parts + ones)))
    return found


def _by_cost(trial: Trial) -> tuple[bool, float]:
    return not trial.accepted, trial.chip_seconds


def _trials(ask: Callable[[Slice], PlanReport], slices: Iterable[Slice], fitting: bool = True) -> list[Trial]:
    """A search on every slice; those whose axes do not divide the model are passed over, and with `fitting` those that do not hold it."""
    trials = []
    for slice_ in slices:
        try:
            found = ask(slice_)
        except InvalidInput:
            continue
        if found.best.fits or not fitting:
            trials.append(Trial(found))
    return trials


def _shapes_of(chip: Chip, num_chips: int) -> list[Slice]:
    """All shapes of so many chips, sides powers of two."""
    exact = (shape for shape in shapes(chip, num_chips) if math.prod(shape) == num_chips)
    return [make_slice(chip, shape) for shape in exact if all(side & (side - 1) == 0 for side in shape)]


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
