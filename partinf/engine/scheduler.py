"""The scheduler: which sequences take part in the next iteration, and the `Step` that says so to the runner.

Iteration-level scheduling (Orca, section 3.2): a new step is put together for every iteration, so that sequences join and leave
between any two. Decode rows and prefill chunks of any sequences share a step (selective batching, section 3.3). A `Policy` says who
runs, in one method.
"""

from __future__ import annotations

from partinf.engine.batch import BatchBuilder, Policy, ScheduledBatch
from partinf.engine.metrics import Metrics
from partinf.engine.roster import Roster
from partinf.engine.runner import RunnerLimits


class Scheduler(Roster):
    """The roster, with the policy that fills each batch from it."""

    def __init__(self, limits: RunnerLimits, policy: Policy, metrics: Metrics | None = None, prefix_caching: bool = False) -> None:
        super().__init__(limits, metrics, prefix_caching)
        self.policy = policy

    def schedule(self, now: float = 0.0) -> ScheduledBatch | None:
        """The next iteration; None when no sequence can run. Positions and iteration counts of those that run move on."""
        builder = BatchBuilder(self, now)
        self.policy.schedule(builder)
        return builder.build()
