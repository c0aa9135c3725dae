"""The question to the planner: how to split a model for a workload, and how steps are priced."""

from __future__ import annotations

from dataclasses import dataclass

from partinf.cost.calibration import calibration_for
from partinf.cost.collectives import BandwidthModel
from partinf.cost.pricing import Pricing
from partinf.cost.program import Program
from partinf.cost.routing import skew_offences
from partinf.foundation.errors import raise_offences
from partinf.hardware.slices import Slice
from partinf.model.config import ModelConfig
from partinf.planner.evaluate import Evaluator
from partinf.workload import Workload


@dataclass(frozen=True)
class Question:
    """One question, for any slice.

    Attributes:
        calibration: `fitted` or `none` (the pure roofline).
        program: what is credited, see `partinf.cost.program`; None for that of the chip.
        skew: of routers of experts, see `partinf.cost.routing`; 0 for uniform routing.

    Raises:
        InvalidInput: a skew that is out of range, or of a model without experts.
    """

    model: ModelConfig
    workload: Workload
    calibration: str = "fitted"
    bandwidth_model: BandwidthModel = BandwidthModel.AXIS
    program: Program | None = None
    skew: float = 0.0

    def __post_init__(self) -> None:
        raise_offences(skew_offences(self.skew, self.model.name, self.model.experts is not None))

    def pricing(self, slice_: Slice) -> Pricing:
        """The prices of this slice under the question's terms.

        Raises:
            InvalidInput: an unknown calibration.
        """
        return Pricing(slice_, calibration_for(slice_.chip, self.calibration), self.bandwidth_model, self.program, self.skew)

    def evaluator(self, slice_: Slice) -> Evaluator:
        """What prices steps of this slice.

        Raises:
            InvalidInput: an unknown calibration.
        """
        return Evaluator(self.model, self.pricing(slice_), self.workload)
