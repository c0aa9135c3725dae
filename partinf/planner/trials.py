"""Searches over slices: `--slice auto:CHIP`, the cheapest slice that keeps a latency bound.

One shape per number of chips comes first, the most cubic: a longer one of as many chips has fewer links across its middle. Of the
cheapest number all shapes are tried. Cost is chip-seconds of the question's step or workload.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from partinf.foundation.errors import InvalidInput
from partinf.foundation.units import figures
from partinf.hardware.chips import Chip
from partinf.hardware.slices import Slice
from partinf.model.weights import num_params
from partinf.planner.question import Question
from partinf.planner.report import PlanReport, answer
from partinf.planner.slices import MOST_CHIPS, shapes_of, slices_of

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
            return best.main.step_seconds
        return count * prefill.step_seconds + workload.output_len * decode.step_seconds


def cheapest(question: Question, chip: Chip) -> list[Trial]:
    """Slices that were tried, those that keep the bound first and the cheapest of them foremost.

    Raises:
        InvalidInput: no slice holds the model or none keeps the bound; the one that comes nearest.
    """
    model, workload = question.model, question.workload
    least = num_params(model) * workload.weights.num_bytes
    large = [slice_ for slice_ in slices_of(chip) if slice_.num_devices * chip.usable_hbm_per_device() >= least]
    trials = _fitting(question, large)
    if not trials:
        raise InvalidInput(f"model {model.name} fits no slice of {chip.name} of up to {MOST_CHIPS} chips")
    if not any(trial.accepted for trial in trials):
        near = min(trials, key=lambda trial: trial.seconds)
        bound, took = (workload.max_latency or 0.0) * 1e3, near.seconds * 1e3
        raise InvalidInput(f"no slice of {chip.name} keeps {bound:g} ms; the fastest, {near.report.slice.name}, takes {figures(took)} ms")
    first = min(trials, key=_by_cost).report.slice
    trials += _fitting(question, (slice_ for slice_ in shapes_of(chip, first.num_chips) if slice_.shape != first.shape))
    return sorted(trials, key=_by_cost)


def _by_cost(trial: Trial) -> tuple[bool, float]:
    return not trial.accepted, trial.chip_seconds


def _fitting(question: Question, slices: Iterable[Slice]) -> list[Trial]:
    """Those of the slices that hold the model."""
    trials = [trial for slice_ in slices if (trial := _trial(question, slice_))]
    return [trial for trial in trials if trial.report.best.fits]


def _trial(question: Question, slice_: Slice) -> Trial | None:
    """None where the slice's axes do not divide the model."""
    try:
        return Trial(answer(question, slice_))
    except InvalidInput:
        return None


def price_per_million_tokens(trial: Trial, per_chip_hour: float) -> float:
    """Money for a million tokens under the best candidate: generated ones of a whole workload, those of the step of one phase."""
    workload, best = trial.report.workload, trial.report.best
    tokens = best.main.tokens if workload.phase or not workload.output_len else workload.batch * workload.output_len
    return trial.chip_seconds / _SECONDS_PER_HOUR * per_chip_hour / tokens * 1e6
